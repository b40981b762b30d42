"""Why half-cheetah's direction stays where it does: three measurements on trained policies.

    python results/rl/diagnose.py noise RUN...                 # what the noise of the inner gradient costs each direction
    python results/rl/diagnose.py outer RUN...                 # what an outer step gains on its own and on fresh roll-outs
    python results/rl/diagnose.py told --iterations 100        # a policy that is told its direction instead of adapting

RUN is a folder with config.json and checkpoint.pt, as train_rl.py leaves it. `--json FILE` keeps the numbers: what is
measured now replaces the entries of the same runs, the rest of the file stays.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train_rl as rl  # noqa: E402
from common import UsageError, describe_machine, mean_ci95, progress_over, run_main  # noqa: E402


def load(run: Path, threads: int | None):
    """(flags of the run, its environment, its learner with the checkpoint's weights, iterations of training)."""
    if not (run / "checkpoint.pt").exists():
        raise UsageError(f"{run} has no checkpoint.pt: name the folder of a run that was made on this machine")
    config = json.loads((run / "config.json").read_text())
    if config["env"] != "cheetah-dir":
        raise UsageError(f"{run} is a run of {config['env']}: the diagnosis is about cheetah-dir")
    config = {k: v for k, v in config.items() if k != "threads"}
    args = rl.parse_flags(["--env", config["env"], "--method", config["method"]])
    vars(args).update(config, threads=threads)
    env = rl.ENVIRONMENTS[args.env](args, torch.device("cpu"))
    learner = rl.build_learner(args, env, torch.device("cpu"))
    checkpoint = torch.load(run / "checkpoint.pt", map_location="cpu", weights_only=True)
    learner.load(checkpoint["weights"])
    return args, env, learner, checkpoint["now"]["iteration"]


def by_direction(tasks: torch.Tensor, returns: torch.Tensor) -> dict:
    """Mean and standard deviation over the tasks of each direction."""
    split = {"forwards": returns[tasks[:, 0] > 0], "backwards": returns[tasks[:, 0] < 0]}
    return {name: [part.mean().item(), part.std().item()] for name, part in split.items()}


def noise(run: Path, args) -> dict:
    """Returns after one update from each task's own roll-outs, and after the mean update of all tasks of its direction.

    Where the two differ the noise of single updates is what costs; what stays is what the gaits can do."""
    args, env, learner, iterations = load(run, args.threads)
    rng = torch.Generator().manual_seed(rl.EVALUATION_SEED)
    tasks = env.sample_tasks(args.test_tasks, rng)
    start = learner.unadapted(len(tasks))
    pre = rl.Batch.of(rl.collect(env, tasks, learner, start, args.rollouts, rng, "before", run), args)
    own = rl.adapted_policy(learner, start, pre, args, differentiable=False)
    forwards = tasks[:, 0] > 0
    shared = {}
    for name, t in own.items():
        shared[name] = t.clone()
        for group in (forwards, ~forwards):
            shared[name][group] = t[group].mean(0)
    moves = torch.cat([(t - start[name]).flatten(1) for name, t in own.items()], 1)
    means = torch.cat([(t - start[name]).flatten(1) for name, t in shared.items()], 1)
    found = {"iterations": iterations, "noise_over_mean": ((moves - means).norm(dim=1) / means.norm(dim=1)).mean().item()}
    for name, policy in (("own", own), ("mean", shared)):
        returns = rl.collect(env, tasks, learner, policy, args.rollouts, rng, name, run).returns()
        found[f"{name}_update"] = by_direction(tasks, returns)
    return found


def outer(run: Path, args) -> dict:
    """The outer surrogate's gain by one TRPO step, on the roll-outs that the step was computed from and on others."""
    repeats, threads = args.repeats, args.threads
    args, env, learner, iterations = load(run, threads)
    weights, gains = learner.state(), {"own": [], "fresh": []}
    for repeat in progress_over(repeats, f"outer steps of {run.name}"):
        rng = torch.Generator().manual_seed(rl.EVALUATION_SEED + repeat)
        learner.load(weights)
        batches = {name: outer_batch(learner, env, args, rng, run) for name in gains}
        before = {name: surrogate(learner, args, *batch).loss.item() for name, batch in batches.items()}
        pre, post, old = batches["own"]
        adapted = rl.adapted_policy(learner, learner.unadapted(args.meta_batch), pre, args, differentiable=True)
        now = rl.surrogate(learner, adapted, post, old)
        gradient = rl.flat_grad(now.loss, learner.parameters(), keep=False).detach()
        thin = [batch.every(args.curvature_stride, env.horizon) for batch in (pre, post)]
        rl.trpo_step(learner.parameters(), gradient, now.loss.item(), rl.fisher_product(learner, *thin, args),
                     lambda: surrogate(learner, args, pre, post, old), args)
        for name, batch in batches.items():
            gains[name].append(before[name] - surrogate(learner, args, *batch).loss.item())
    return {"iterations": iterations, "steps": repeats, **{f"gain_{name}": list(mean_ci95(g)) for name, g in gains.items()}}


def outer_batch(learner, env, args, rng: torch.Generator, run: Path) -> tuple:
    """Roll-outs of fresh tasks before and after the update, and the adapted policies' distributions: (pre, post, old)."""
    tasks = env.sample_tasks(args.meta_batch, rng)
    start = learner.unadapted(len(tasks))
    pre = rl.Batch.of(rl.collect(env, tasks, learner, start, args.rollouts, rng, "before", run), args)
    adapted = rl.adapted_policy(learner, start, pre, args, differentiable=False)
    post = rl.Batch.of(rl.collect(env, tasks, learner, adapted, args.rollouts, rng, "after", run), args)
    with torch.no_grad():
        old = rl.distribution(learner, adapted, learner.prefix(learner.theta, post.observations))
    return pre, post, tuple(t.clone() for t in old)                      # log_std is a view of a parameter


@torch.no_grad()
def surrogate(learner, args, pre, post, old) -> rl.Trial:
    adapted = rl.adapted_policy(learner, learner.unadapted(args.meta_batch), pre, args, differentiable=False)
    return rl.surrogate(learner, adapted, post, old)


def told(args) -> dict:
    """Train CAVIA's network with the direction itself as its context; as many roll-outs after the update, none before.

    What is reached is what policy, optimiser and samples can do when nothing has to be found out."""
    flags = rl.parse_flags(["--env", "cheetah-dir", "--method", "cavia", "--context-size", "1", "--seed", str(args.seed)]
                           + (["--smoke"] if args.smoke else []))
    flags.threads = args.threads
    torch.manual_seed(args.seed)
    rng, env = torch.Generator().manual_seed(args.seed), rl.HalfCheetah(flags, torch.device("cpu"))
    learner, run = rl.build_learner(flags, env, torch.device("cpu")), ROOT
    record = {"after": [], "std": []}
    adapted_policy = rl.adapted_policy
    rl.adapted_policy = lambda learner, current, *_, **__: given         # the curvature's inner step: there is none
    try:
        for _ in progress_over(args.iterations, "told its direction"):
            tasks = env.sample_tasks(flags.meta_batch, rng)
            given = {"context": tasks}
            rollouts = rl.collect(env, tasks, learner, given, flags.rollouts, rng, "training", run)
            post = rl.Batch.of(rollouts, flags)
            with torch.no_grad():
                old = rl.distribution(learner, given, learner.prefix(learner.theta, post.observations))
                old = tuple(t.clone() for t in old)
            now = rl.surrogate(learner, given, post, old)
            gradient = rl.flat_grad(now.loss, learner.parameters(), keep=False).detach()
            thin = post.every(flags.curvature_stride, env.horizon)
            trial = torch.no_grad()(lambda: rl.surrogate(learner, given, post, old))
            rl.trpo_step(learner.parameters(), gradient, now.loss.item(), rl.fisher_product(learner, thin, thin, flags),
                         trial, flags)
            record["after"].append(rollouts.returns().mean().item())
            record["std"].append(learner.theta["log_std"].exp().mean().item())
    finally:
        rl.adapted_policy = adapted_policy
    return {"iterations": args.iterations, "seed": args.seed, **record, **by_direction(tasks, rollouts.returns())}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("noise", "outer", "told"))
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="folders of runs of cheetah-dir (noise, outer)")
    parser.add_argument("--iterations", type=int, default=100, help="of training (told)")
    parser.add_argument("--repeats", type=int, default=8, help="outer steps, each from the checkpoint (outer)")
    parser.add_argument("--seed", type=int, default=1, help="of training (told)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help="few tasks and roll-outs (told)")
    parser.add_argument("--json", type=Path, help="keep the numbers in this file")
    args = parser.parse_args(argv)
    if (args.what == "told") == bool(args.runs):
        parser.error("noise and outer need at least one RUN, told none")
    torch.set_num_threads(args.threads)
    found = {}
    if args.what == "told":
        found[f"told-seed{args.seed}"] = told(args)
    for run in args.runs:
        found[f"{args.what} {run.name}"] = {"noise": noise, "outer": outer}[args.what](run, args)
    for name, numbers in found.items():
        print(name, json.dumps({k: v[-5:] if isinstance(v, list) else v for k, v in numbers.items()}))
    if args.json:
        kept = json.loads(args.json.read_text()) if args.json.exists() else {}
        kept.update(found, machine=describe_machine(torch.device("cpu")))
        args.json.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
