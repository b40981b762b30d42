"""Fig. 9 with the noise in the test alone: accuracy of trained runs against the noise in their inner gradient.

    python results/ablations/noise.py runs/ablations/base runs/ablations/maml runs/ablations/metasgd --threads 1

RUNs are run folders of train_miniimagenet.py with their checkpoint.pt; their best weights in validation are tested on the first
`--tasks` of the test tasks. Whether the paper's noise acts in training too is not said; the runs noise*/ here had it in both.
The file keeps each figure as soon as it is there; those that it has already, by the run's name, of as many tasks of the same
data, are not measured again. Those of results/ are with `--json results/ablations/noise.json`.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_miniimagenet as mini  # noqa: E402
from common import (UsageError, allow_tf32, describe_machine, mean_ci95, non_negative_float, positive_int, run_main,  # noqa: E402
                    save_atomically, use_available_kernel)

DATA = ROOT / "data/mini-imagenet"


def load_run(run: Path, device: torch.device) -> tuple[argparse.Namespace, mini.Learner]:
    """The settings of a run and its learner with the weights that its test used. Raises UsageError."""
    try:
        recorded = json.loads((run / "config.json").read_text())
        recorded["eval_batch"] = mini.DRAWN
        args = argparse.Namespace(**{**vars(mini.parse_flags(["--method", recorded["method"]])), **recorded})
        use_available_kernel(args, device)
        allow_tf32(args.precision == "tf32")
        checkpoint = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
        learner = mini.build_learner(args, device)
        learner.load(checkpoint["now"]["best"] or checkpoint["weights"])
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        raise UsageError(f"{run} holds no run of train_miniimagenet.py: {error}") from None
    return args, learner


def flags_of(doc: str, file: str) -> argparse.ArgumentParser:
    """What both scripts here take; `file` is where the figures go."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--tasks", type=positive_int, default=400, help="test tasks")
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--json", type=Path, default=ROOT / "runs" / file, help=f"file of the figures (default: runs/{file})")
    return parser


def open_runs(flags: argparse.Namespace) -> Iterator[tuple[Path, argparse.Namespace, mini.Learner, torch.Tensor]]:
    """Each run: its folder, settings, learner and test images."""
    torch.set_num_threads(flags.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for path in flags.runs:
        args, learner = load_run(path, device)
        images = mini.load_split(flags.data, args.test_split, mini.stored_size(args), args.resize_nearest)
        yield path, args, learner, mini.to_tensor(images, device)


def keep(flags: argparse.Namespace, runs: dict, command: str) -> None:
    """Write the figures of all runs, those of earlier calls too."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    flags.json.parent.mkdir(parents=True, exist_ok=True)
    figures = {"command": command, **describe_machine(device), "runs": runs}
    save_atomically(flags.json, lambda file: file.write(json.dumps(figures, indent=1).encode() + b"\n"))


def kept(flags: argparse.Namespace) -> dict:
    return json.loads(flags.json.read_text())["runs"] if flags.json.exists() else {}


def draw(path: Path, runs: dict) -> None:
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    picture, axes = plt.subplots(figsize=(6, 4), dpi=110)
    for run in runs.values():
        points = sorted((float(level), cell["value"], cell["ci95"]) for level, cell in run["accuracy"].items())
        levels, values, ci95 = zip(*points)
        axes.errorbar(range(len(levels)), [100 * v for v in values], [100 * c for c in ci95], capsize=3,
                      label=f"{run['method']}, alpha {run['inner_lr']:g}")
        axes.set_xticks(range(len(levels)), [f"{level:g}" for level in levels])
    axes.set(xlabel="standard deviation of the noise in the inner gradient, test alone", ylabel="test accuracy, %")
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    picture.tight_layout()
    save_atomically(path, lambda file: picture.savefig(file, format="png"))


def main() -> None:
    parser = flags_of(__doc__, "noise.json")
    parser.add_argument("--levels", type=non_negative_float, nargs="+", default=[0, 0.03, 0.1, 0.3, 1],
                        help="standard deviations of the noise")
    flags = parser.parse_args()
    runs = kept(flags)
    for path, args, learner, images in open_runs(flags):
        run = runs.setdefault(path.name, {"method": args.method, "inner_lr": args.inner_lr, "shots": args.shots, "accuracy": {}})
        for level in flags.levels:
            of_these = {"tasks": flags.tasks, "data": None if flags.data == DATA else str(flags.data), "precision": args.precision}
            cell = run["accuracy"].get(f"{level:g}")
            if cell is None or not of_these.items() <= ({"data": None, "precision": args.precision} | cell).items():      # older ones
                args.gradient_noise = level
                value, ci95 = mean_ci95(mini.evaluate(learner, args, images, flags.tasks, f"{path.name}, noise {level:g}"))
                run["accuracy"][f"{level:g}"] = {"value": value, "ci95": ci95, **of_these}
                keep(flags, runs, "python results/ablations/noise.py RUN...")
                print(f"{path.name}, noise {level:g}: {100 * value:.2f} ± {100 * ci95:.2f} %", flush=True)
    draw(flags.json.with_suffix(".png"), runs)


if __name__ == "__main__":
    run_main(main)
