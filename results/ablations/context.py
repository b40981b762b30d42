"""What of a task reaches its context: why nu points the same way for all tasks.

    python results/ablations/context.py runs/84px-modgrad-h200 --tasks 100 --threads 1

RUNs are run folders of train_miniimagenet.py with their checkpoint.pt. nu is minus the gradient of the trial step's loss with
respect to what Psi reads (Eq. 9), and reaches that loss through M alone: with g the support gradient and g' the one after the
trial step, dL/dM = -alpha g ⊙ g', of which the factors of M = relu(row ⊗ col) receive weighted sums, dL/drow over a row and
dL/dcol over a column. Where g' is like g, g ⊙ g' is like a square: its signs are the same for all tasks. For each adapted
matrix, over the first test tasks: the mean cosine between g and g'; the share of the sum of |g ⊙ g'| that is of positive
entries; and the mean cosine between two tasks' g, g ⊙ g', dL/drow, dL/dcol. context.json keeps the figures of other runs.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from modulation import describe_context  # noqa: E402
from noise import UsageError, allow_tf32, flags_of, keep, kept, mini, open_runs, run_main  # noqa: E402


def signals(learner: mini.Learner, args: argparse.Namespace, images: Tensor, tasks: int) -> dict[str, tuple[Tensor, ...]]:
    """{name: (g, g', dL/dM, dL/drow, dL/dcol)} of each adapted matrix, at nu = 0 and before any inner step:
    the first three (T, n1, n2), the others (T, n1) and (T, n2)."""
    rng, found = torch.Generator().manual_seed(mini.EVALUATION_SEED), {}
    start = {name: learner.theta[name].detach() for name in learner.adapted}
    for first in range(0, tasks, mini.DRAWN):
        x, y, _, _ = mini.sample_episodes(images, min(mini.DRAWN, tasks - first), args.ways, args.shots, args.queries, rng)
        with torch.no_grad():
            features = learner.prefix(learner.theta, mini.to_input(x, args))
            factors = learner.generator(torch.zeros(len(x), args.context_dim, device=x.device))
        gradient = lambda at: dict(zip(at, torch.autograd.grad(
            mini.cross_entropy(learner.suffix({**learner.theta, **at}, features), y).sum(), list(at.values()))))
        g = gradient({name: t.expand(len(x), *t.shape).clone().requires_grad_() for name, t in start.items()})
        m = {name: row.unsqueeze(2) * col.unsqueeze(1) for name, (row, col) in factors.items()}           # before the ReLU
        after = gradient({name: (t - args.inner_lr * m[name].relu().reshape(g[name].shape) * g[name]).requires_grad_()
                          for name, t in start.items()})
        for name, (row, col) in factors.items():
            if row.shape[1] > 1:
                one, two = (gradients[name].reshape(m[name].shape) for gradients in (g, after))
                by_m = -args.inner_lr * one * two
                open_ = by_m * (m[name] > 0)
                sums = (open_ @ col.unsqueeze(2)).squeeze(2), (row.unsqueeze(1) @ open_).squeeze(1)
                found.setdefault(name, []).append((one, two, by_m, *sums))
    return {name: tuple(torch.cat(parts) for parts in zip(*batches)) for name, batches in found.items()}


def describe(g: Tensor, after: Tensor, by_m: Tensor, by_row: Tensor, by_col: Tensor) -> dict[str, float]:
    """The six numbers that the head of this file names."""
    cosines = {f"cosine_of_{name}": describe_context(t.flatten(1))["cosine"]
               for name, t in (("g", g), ("dM", by_m), ("drow", by_row), ("dcol", by_col))}
    return {"alike": F.cosine_similarity(g.flatten(1), after.flatten(1)).mean().item(),
            "positive": (by_m.clamp(max=0).sum() / -by_m.abs().sum()).item(), **cosines}


def main() -> None:
    flags = flags_of(__doc__, "context.json").parse_args()
    runs = kept(flags)
    for path, args, learner, images in open_runs(flags):
        if args.method != "modgrad":
            raise UsageError(f"{path} is a run of {args.method}, which has no context")
        args.precision = "fp32"
        allow_tf32(False)
        tensors = {name: describe(*found) for name, found in signals(learner, args, images, flags.tasks).items()}
        runs[path.name] = {"command": f"python results/ablations/context.py {path} --tasks {flags.tasks}", "tasks": flags.tasks,
                           "inner_lr": args.inner_lr, "shots": args.shots, "tensors": tensors}
        keep(flags, runs, "python results/ablations/context.py RUN...")
        for name, values in tensors.items():
            print(f"{path.name}, {name}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()), flush=True)


if __name__ == "__main__":
    run_main(main)
