"""What M becomes: its size and how much of it is the task's, on test tasks of trained ModGrad runs.

    python results/ablations/modulation.py runs/ablations/base --threads 1

RUNs are run folders of train_miniimagenet.py with their checkpoint.pt. For each adapted tensor, over its entries and the tasks,
of the M that multiplies the last step's gradient: mean, root mean square, share of zeros; and its spread over tasks, the root
mean square over entries of the standard deviation over tasks, as a share of the root mean square. Then the accuracy with each
task's own M and with that of another task. modulation.json keeps the figures of other runs.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from noise import ROOT, UsageError, describe_machine, load_run, mean_ci95, mini, run_main, save_atomically  # noqa: E402


def masks(learner: mini.Learner, args: argparse.Namespace, images: torch.Tensor, tasks: int, what: str) -> tuple[dict, list]:
    """{name: M (T, n1, n2)} of the first test tasks, and their accuracies."""
    seen: list[dict] = []
    hook = learner.generator.register_forward_hook(lambda module, inputs, factors: seen.append(factors))
    accuracies = mini.evaluate(learner, args, images, tasks, what)
    hook.remove()
    calls = len(seen) // -(-tasks // args.eval_batch)                      # of one batch of tasks; the last is the last step's
    last = seen[calls - 1::calls]
    return {name: torch.cat([(batch[name][0].unsqueeze(2) * batch[name][1].unsqueeze(1)).relu().detach() for batch in last])
            for name in learner.adapted}, accuracies


def with_masks_of_others(learner: mini.Learner, args: argparse.Namespace, images: torch.Tensor, tasks: int, what: str) -> list:
    """Accuracies where each step of a task takes the M of the task before it in its batch."""
    def exchange(module, inputs, factors):
        if inputs[0].any():                                                # not where nu = 0, from which a task's nu comes
            return {name: (row.roll(1, 0), col.roll(1, 0)) for name, (row, col) in factors.items()}

    if tasks % args.eval_batch == 1 or args.eval_batch == 1:
        raise UsageError(f"--tasks {tasks}: the last batch of {args.eval_batch} holds one task alone, which has no other")
    hook = learner.generator.register_forward_hook(exchange)
    accuracies = mini.evaluate(learner, args, images, tasks, f"{what}, another task's M")
    hook.remove()
    return accuracies


def describe(m: torch.Tensor) -> dict[str, float]:
    rms = m.square().mean().sqrt()
    spread = m.var(0).mean().sqrt()
    return {"mean": m.mean().item(), "rms": rms.item(), "zeros": (m == 0).float().mean().item(), "spread": (spread / rms).item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--tasks", type=int, default=400, help="test tasks, of the first 100 of which M is described")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=ROOT / "data/mini-imagenet")
    parser.add_argument("--json", type=Path, default=ROOT / "results/ablations/modulation.json")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {**describe_machine(device), "runs": json.loads(flags.json.read_text())["runs"] if flags.json.exists() else {}}
    for path in flags.runs:
        args, learner = load_run(path, device)
        images = mini.to_tensor(mini.load_split(flags.data, args.test_split, mini.stored_size(args)), device)
        others = with_masks_of_others(learner, args, images, flags.tasks, path.name)
        found, accuracies = masks(learner, args, images, flags.tasks, path.name)
        figures["runs"][path.name] = {
            "command": f"python results/ablations/modulation.py {path} --tasks {flags.tasks}", "tasks": flags.tasks,
            "inner_lr": args.inner_lr, "shots": args.shots, "tensors": {name: describe(m[:100]) for name, m in found.items()},
            **{key: dict(zip(("value", "ci95"), mean_ci95(values))) for key, values in (
                ("own", accuracies), ("of_another_task", others),
                ("own_less_other", [own - other for own, other in zip(accuracies, others)]))}}
        for name, values in figures["runs"][path.name]["tensors"].items():
            print(f"{path.name}, {name}: " + ", ".join(f"{key} {value:.3g}" for key, value in values.items()), flush=True)
        for key in ("own", "of_another_task", "own_less_other"):
            value, ci95 = figures["runs"][path.name][key].values()
            print(f"{path.name}, {key.replace('_', ' ')}: {100 * value:.2f} ± {100 * ci95:.2f} %", flush=True)
    save_atomically(flags.json, lambda file: file.write(json.dumps(figures, indent=1).encode() + b"\n"))


if __name__ == "__main__":
    run_main(main)
