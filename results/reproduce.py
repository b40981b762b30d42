"""Every table and figure of the paper at its size: a list beside the paper's numbers, and a queue of runs that resume.

    python results/reproduce.py                                   # the list, and how far each run is
    python results/reproduce.py 'table2-*-5shot' fig5-leap        # these, one after the other
    python results/reproduce.py all --jobs 4 --minutes 480        # all of them, four at once, within eight hours

NAME's run is the folder INTO/NAME; what its script prints is in INTO/NAME.txt. A second call, on the same kind of device, goes on
where the first one ended, whether by Ctrl-C, by a failure or by --minutes, after which what was trained so far is tested. Several
at once pay on a GPU, more so under NVIDIA's MPS (`nvidia-cuda-mps-control -d`), and on a CPU up to its number of cores.

Where the paper leaves two readings open both are here: MAML's alpha, 0.01 of the mean loss or 0.05, which its authors' 0.01 of a
sum over five classes is; Table 4 by Algorithm 1 or by the released code (refine); Fig. 5 with 15 images of each class (LEAP's
code) or 1 to 25 (imbalanced). Fig. 9's noise is in training and test here; `results/ablations/noise.py` adds it to the test of
trained runs alone. Fig. 7 is `train_celeba.py --figure` of Table 3's runs.
"""

import argparse
import contextlib
import fnmatch
import functools
import importlib
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "results")]
from common import MAY_CHANGE, UsageError, positive_float, positive_int, progress, run_main, seed_number  # noqa: E402
from table import ABLATIONS, CELEBA, CELLS, OMNIGLOT, PAPER, RL  # noqa: E402

PRETRAINED = "table2-wrn28-10-pretrain"      # where WRN-28-10 starts from
DATA = {"train_miniimagenet.py": "data/mini-imagenet", "train_celeba.py": "data/celeba", "train_omniglot.py": "data/omniglot"}
UNITS = "episode", "iteration", "meta_step", "update"


@functools.cache
def cells() -> dict[str, tuple[str, str]]:
    """{name: (command, the paper's number or "-")}; a command names another run's folder as INTO/NAME."""
    found = {}
    conv4, wrn, resnet = (f"train_miniimagenet.py --backbone {name}" for name in ("conv4", "wrn28-10", "resnet34"))
    for shots in (5, 1):
        for method in ("modgrad", "maml", "metasgd", "tnet"):
            found[f"table2-{method}-{shots}shot"] = f"{conv4} --method {method} --shots {shots}", PAPER.get((method, "conv4", shots), "-")
        found[f"table2-maml-alpha0.05-{shots}shot"] = (f"{conv4} --method maml --inner-lr 0.05 --shots {shots}",
                                                       PAPER["maml", "conv4", shots])
        for channels, number in ((64, "-"), (512, PAPER["cavia", "conv4", shots])):
            found[f"table2-cavia{channels}-{shots}shot"] = f"{conv4} --method cavia --channels {channels} --shots {shots}", number
    found[PRETRAINED] = f"{wrn} --method pretrain", "-"
    for shots in (5, 1):
        found[f"table2-wrn28-10-{shots}shot"] = (f"{wrn} --start-from INTO/{PRETRAINED} --freeze-prefix --shots {shots} "
                                                 "--test-episodes 10000", PAPER["modgrad", "wrn28-10", shots])
    for k, (order, pixels) in enumerate(CELLS):
        given = f"train_celeba.py --order {order} --pixels {pixels} --meta-lr-schedule cosine"      # the rate of the runs in results/celeba
        for method, numbers in CELEBA.items():
            found[f"table3-{order}{pixels}-{method}"] = f"{given} --method {method}", f"{numbers[k]:.3f}"
        # with which ours comes nearer to the paper's number; at 100 pixels the default rate diverges
        found[f"table3-{order}{pixels}-modgrad-3steps"] = (f"{given} --inner-steps 3{' --meta-lr 0.0005' * (pixels == 100)}",
                                                           f"{CELEBA['modgrad'][k]:.3f}")
    for table, flag in ((4, "inner_steps"), (5, "rank")):       # the default's row is table2-modgrad
        _, default, paper = ABLATIONS[flag]
        for shots in (5, 1):
            for value in sorted(paper[shots].keys() - {default}):
                flags = f"--{flag.replace('_', '-')} {value} --shots {shots}"
                name = f"table{table}-{flag.replace('inner_', '')}{value}"
                found[f"{name}-{shots}shot"] = f"{conv4} {flags}", f"{paper[shots][value]:.2f}"
                if table == 4:
                    found[f"{name}-refine-{shots}shot"] = f"{conv4} --refine {flags}", f"{paper[shots][value]:.2f}"
    for method in ("modgrad", "leap", "reptile", "fomaml"):
        found[f"fig5-{method}"] = f"train_omniglot.py --method {method}", OMNIGLOT.get(method, "-")
    for method in ("modgrad", "leap"):
        found[f"fig5-{method}-imbalanced"] = f"train_omniglot.py --method {method} --imbalanced", OMNIGLOT[method]
    for shots in (10, 15, 20):
        found[f"fig6-modgrad-{shots}shot"] = f"{conv4} --shots {shots}", "-"
    for shots in (5, 10, 15, 20):
        for steps in (5, 10, 20, 30):
            found[f"fig6-fomaml-{shots}shot-steps{steps}"] = f"{conv4} --method fomaml --shots {shots} --inner-steps {steps}", "-"
    for shots in (5, 1):
        found[f"fig6-resnet34-modgrad-{shots}shot"] = f"{resnet} --shots {shots}", "-"
        for steps in (5, 10, 20, 30):
            found[f"fig6-resnet34-fomaml-{shots}shot-steps{steps}"] = (
                f"{resnet} --method fomaml --shots {shots} --inner-steps {steps}", "-")
    for (env, method), number in RL.items():
        found[f"fig8-{env}-{method}"] = f"train_rl.py --env {env} --method {method}", number
    for level in (0.1, 1):
        for shots in (5, 1):
            for method in ("modgrad", "maml", "metasgd", "tnet", "cavia"):
                found[f"fig9-noise{level:g}-{method}-{shots}shot"] = (
                    f"{conv4} --method {method} --shots {shots} --gradient-noise {level:g}", "-")
    return found


def for_machine(command: str, gpu: bool) -> list[str]:
    """Flags that suit the machine: precision, tasks evaluated at once, threads."""
    script = command.split()[0]
    if not gpu or script == "train_rl.py":      # whose simulators run on CPU cores
        return ["--device", "cpu", "--threads", "1"]
    conv4 = "--backbone conv4" in command
    return {"train_miniimagenet.py": ["--precision", "bf16" if conv4 else "tf32", *["--eval-batch", "25"] * conv4,
                                      "--checkpoint-every", "3000"],
            "train_omniglot.py": ["--precision", "tf32"],
            "train_celeba.py": ["--eval-batch", "250", "--checkpoint-every", "2500"]}[script]


def command_of(name: str, args: argparse.Namespace) -> list[str]:
    """The words after "python" with which a run starts or goes on."""
    command = cells()[name][0]
    words = [str(args.into / word.removeprefix("INTO/")) if word.startswith("INTO/") else word for word in command.split()]
    return [*words, *for_machine(command, args.gpu), "--seed", str(args.seed), "--out", str(args.into / name), "--resume"]


def script_of(name: str):
    """The module of a script, such as train_rl.py."""
    return importlib.import_module(name.removesuffix(".py"))


def settings_of(name: str, args: argparse.Namespace) -> dict:
    """The flags of a run, by name, but for what depends on the machine or may differ between two halves of a run."""
    script, *words = command_of(name, args)
    flags = vars(script_of(script).parse_flags(words))
    return {flag: value for flag, value in json.loads(json.dumps(flags, default=str)).items() if flag not in MAY_CHANGE | {"precision"}}


def state_of(name: str, args: argparse.Namespace) -> tuple[bool, str]:
    """Whether a run is done to its end, with its present settings, and what there is of it."""
    run = args.into / name
    try:
        result = json.loads((run / "result.json").read_text())
    except FileNotFoundError:
        return False, "begun" if (run / "checkpoint.pt").exists() else ""
    except ValueError as error:
        return False, f"{run / 'result.json'} cannot be read ({error}): remove it"
    unit = next(unit for unit in UNITS if f"{unit}s" in result)
    trained, wanted = result[f"{unit}s"], result["config"][f"{unit}s"]
    scale, digits = {"accuracy": (100, 2), "mse": (1, 4)}.get(result["metric"], (1, 1))
    text = "SYNTHETIC " * result.get("synthetic", False)
    numbers = [result["value"], result["ci95"]]
    text += "not finite" if None in numbers else " ± ".join(f"{scale * number:.{digits}f}" for number in numbers)
    if trained < wanted:
        text += f" after {trained:,} of {wanted:,} {unit.replace('_', '-')}s"
    others = [f"{flag} {result['config'][flag]}" for flag, value in settings_of(name, args).items()
              if result["config"].get(flag, value) != value]
    text += f" with other settings ({', '.join(others)})" * bool(others)
    return trained >= wanted and not others, text


def trained_minutes(run: Path) -> float:
    """What a run has trained so far, which its --max-minutes counts."""
    with contextlib.suppress(Exception):      # none yet; or damaged, of which the run's script will say so
        return torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)["now"]["seconds"] / 60
    return 0.0


def chosen(patterns: list[str]) -> list[str]:
    """The names that match, in the order of the paper. Raises UsageError for a pattern without any."""
    names = list(cells())
    found = {pattern: fnmatch.filter(names, "*" if pattern == "all" else pattern) for pattern in patterns}
    if idle := [pattern for pattern, match in found.items() if not match]:
        raise UsageError(f"no run is named {', '.join(idle)}: `python results/reproduce.py` lists them")
    wanted = {name for match in found.values() for name in match}
    if any(f"INTO/{PRETRAINED}" in cells()[name][0] for name in wanted):
        wanted.add(PRETRAINED)
    return [name for name in names if name in wanted]


def print_list(names: list[str], args: argparse.Namespace) -> None:
    """One line a run: its name, our number, the paper's, the command."""
    rows = [(name, state_of(name, args)[1] or "-", cells()[name][1], f"python {cells()[name][0]}") for name in names]
    widths = [max(len(row[k]) for row in [*rows, ("run", "ours", "paper")]) for k in range(3)]
    for row in [("run", "ours", "paper", "command"), *rows]:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]))


def start(name: str, args: argparse.Namespace, minutes: float) -> subprocess.Popen:
    """A run's script in its own session, so that Ctrl-C reaches it through this one alone."""
    words = command_of(name, args)
    if minutes < float("inf"):
        words += ["--max-minutes", f"{trained_minutes(args.into / name) + minutes:.3f}"]
    args.into.mkdir(parents=True, exist_ok=True)
    with open(args.into / f"{name}.txt", "a") as output:
        print("$ python", shlex.join(words), file=output, flush=True)
        return subprocess.Popen([sys.executable, str(ROOT / words[0]), *words[1:]], stdout=output, stderr=subprocess.STDOUT,
                                start_new_session=True)


def work_off(names: list[str], args: argparse.Namespace) -> list[str]:
    """Run what is not done of `names`; returns those that failed or could not start. Leaves none running, whatever happens."""
    deadline = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")
    waiting = [name for name in names if not state_of(name, args)[0]]
    running, failed = {}, []
    with progress(len(names), len(names) - len(waiting), "runs") as bar:
        try:
            while waiting or running:
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    code = running.pop(name).returncode
                    failed += [name] * (code != 0)
                    bar.update(code == 0)
                    bar.write(f"{name}: {state_of(name, args)[1] if code == 0 else f'ended with {code}, see {args.into / name}.txt'}")
                for name in list(waiting):
                    start_from = PRETRAINED if f"INTO/{PRETRAINED}" in cells()[name][0] else None
                    if time.monotonic() >= deadline or start_from in failed:
                        waiting.remove(name)
                        failed += [name] * (start_from in failed)
                        bar.write(f"{name}: not started, {f'{start_from} failed' if start_from in failed else 'the time is over'}")
                    elif len(running) < args.jobs and start_from not in [*waiting, *running]:
                        waiting.remove(name)
                        running[name] = start(name, args, (deadline - time.monotonic()) / 60)
                        bar.write(f"{name}: started")
                time.sleep(0.1)
        finally:
            for process in running.values():
                process.send_signal(signal.SIGINT)
            if running:
                with contextlib.suppress(OSError):      # the terminal is gone
                    bar.write(f"stopping {', '.join(running)}: each saves its checkpoint")
            for process in running.values():
                process.wait()
    return failed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", help="names or patterns of what to run, or all; none: print the list")
    parser.add_argument("--jobs", type=positive_int, default=1, help="runs at once (default: 1)")
    parser.add_argument("--minutes", type=positive_float, help="end all training after this time; tests come on top")
    parser.add_argument("--into", type=Path, help="folder of the runs (default: runs/paper, or runs/paper-synthetic)")
    parser.add_argument("--synthetic", action="store_true", help="run on the scripts' SYNTHETIC data where the real are missing")
    parser.add_argument("--seed", type=seed_number, default=1, help="of all runs; choose another --into for each (default: 1)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(argv)
    args.gpu = torch.cuda.is_available()
    args.into = args.into or Path("runs/paper-synthetic" if args.synthetic else "runs/paper")
    names = chosen(args.runs or ["all"])
    needed = {script: DATA[script] for name in names if (script := cells()[name][0].split()[0]) in DATA}
    missing = [f"{folder} (`python {script} --download` fetches it)" for script, folder in needed.items()
               if not (Path(folder).is_dir() and script_of(script).find_data(Path(folder)))]
    if args.runs and missing and not (args.synthetic or args.dry_run):
        raise UsageError(f"without {' and '.join(missing)} these runs would be on SYNTHETIC data: --synthetic runs them so")
    if args.dry_run:
        print(*(shlex.join(["python", *command_of(name, args)]) for name in names), sep="\n")
    elif not args.runs:
        print_list(names, args)
    else:
        failed = work_off(names, args)
        print_list(names, args)
        if failed:
            raise UsageError(f"{len(failed)} of {len(names)} runs failed ({', '.join(failed)}): their outputs are {args.into}/NAME.txt; "
                             "the same command goes on with them")


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):      # as Ctrl-C: no run may go on by itself, unseen
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    run_main(main)
