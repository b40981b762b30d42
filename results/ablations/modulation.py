"""What M becomes: its size and how much of it is the task's, on test tasks of trained ModGrad runs.

    python results/ablations/modulation.py runs/ablations/base --threads 1

RUNs are run folders of train_miniimagenet.py with their checkpoint.pt. For each adapted tensor, over its entries and the tasks,
of the M that multiplies the last step's gradient: mean, root mean square, share of zeros; and its spread over tasks, the root
mean square over entries of the standard deviation over tasks, as a share of the root mean square. Of the nu that M comes from:
its mean length, the standard deviation of the length over tasks, as a share of the mean, and the mean cosine between the nu of
two tasks; the same for an untrained Psi beside the trained theta. Then the accuracy with each task's own M and with that of
another task. M and nu are those of the first 100 tasks. modulation.json keeps the figures of other runs.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
from noise import UsageError, flags_of, keep, kept, mean_ci95, mini, open_runs, run_main  # noqa: E402


def masks(learner: mini.Learner, args: argparse.Namespace, images: torch.Tensor, tasks: int, what: str) -> tuple:
    """{name: M (T, n1, n2)} of the first test tasks, the nu (T, D) they come from, and the tasks' accuracies."""
    seen: list[tuple] = []
    hook = learner.generator.register_forward_hook(lambda module, inputs, factors: seen.append((inputs[0], factors)))
    accuracies = mini.evaluate(learner, args, images, tasks, what)
    hook.remove()
    calls = len(seen) // -(-tasks // args.eval_batch)                      # of one batch of tasks; the last is the last step's
    nus, last = zip(*seen[calls - 1::calls])
    return {name: torch.cat([(batch[name][0].unsqueeze(2) * batch[name][1].unsqueeze(1)).relu().detach() for batch in last])
            for name in learner.adapted}, torch.cat(nus).detach(), accuracies


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
    """The four numbers of M (T, n1, n2) that the head of this file names."""
    rms = m.square().mean().sqrt()
    spread = m.var(0).mean().sqrt()
    return {"mean": m.mean().item(), "rms": rms.item(), "zeros": (m == 0).float().mean().item(), "spread": (spread / rms).item()}


def describe_context(nu: torch.Tensor) -> dict[str, float]:
    """The three numbers of nu (T, D) that the head of this file names."""
    length = nu.norm(dim=1)
    total, tasks = (nu / length[:, None]).sum(0), len(nu)
    return {"length": length.mean().item(), "spread": (length.std() / length.mean()).item(),
            "cosine": ((total @ total - tasks) / (tasks * (tasks - 1))).item()}


def with_untrained_psi(learner: mini.Learner, args: argparse.Namespace) -> mini.Learner:
    """The same theta beside a Psi as it is before training."""
    torch.manual_seed(args.seed)
    return learner._replace(generator=mini.build_learner(args, next(iter(learner.theta.values())).device).generator)


def main() -> None:
    flags = flags_of(__doc__, "modulation.json").parse_args()
    runs = kept(flags)
    for path, args, learner, images in open_runs(flags):
        if args.method != "modgrad":
            raise UsageError(f"{path} is a run of {args.method}, which has no M")
        others = with_masks_of_others(learner, args, images, flags.tasks, path.name)
        found, nu, own = masks(learner, args, images, flags.tasks, path.name)
        untrained = with_untrained_psi(learner, args)
        nu_before = masks(untrained, args, images, min(flags.tasks, 100), f"{path.name}, untrained Psi")[1]
        accuracies = {"own": own, "of_another_task": others, "own_less_other": [one - other for one, other in zip(own, others)]}
        intervals = {key: dict(zip(("value", "ci95"), mean_ci95(values))) for key, values in accuracies.items()}
        tensors = {name: describe(m[:100]) for name, m in found.items()}
        contexts = {"context": describe_context(nu[:100]), "context_of_untrained_psi": describe_context(nu_before)}
        runs[path.name] = {"command": f"python results/ablations/modulation.py {path} --tasks {flags.tasks}", "tasks": flags.tasks,
                           "inner_lr": args.inner_lr, "shots": args.shots, "tensors": tensors, **contexts, **intervals}
        keep(flags, runs, "python results/ablations/modulation.py RUN...")
        for name, values in (tensors | contexts).items():
            print(f"{path.name}, {name.replace('_', ' ')}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)
        for key, r in intervals.items():
            print(f"{path.name}, {key.replace('_', ' ')}: {100 * r['value']:.2f} ± {100 * r['ci95']:.2f} %", flush=True)


if __name__ == "__main__":
    run_main(main)
