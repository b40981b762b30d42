"""Whole meta-steps on mini-ImageNet shapes: this repository against a plain one-task-at-a-time implementation.

    python benchmark.py                      # seconds per episode, ratio, share of the matrix-multiply rate, memory
    python benchmark.py --profile            # and where the time goes
    python benchmark.py --json results/speed-cpu.json

The opponent is tests/naive.py, the paper's equations over the full network with autograd.grad(create_graph=True), as the
public MAML codes do it. Both do the same work: 5-way 5-shot Conv-4, forward, all derivatives, Adam. Their meta-gradients
are compared before anything is timed. Images are synthetic: speed does not depend on what they show.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import train_miniimagenet as mini
from common import describe_machine, positive_int, run_main, save_atomically, setup
from tests import naive


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--meta-batch", type=positive_int, default=3, help="tasks per meta-step")
    parser.add_argument("--shots", type=positive_int, default=5)
    parser.add_argument("--image-size", type=positive_int, default=84)
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed meta-steps of each contender")
    parser.add_argument("--memory", type=positive_int, nargs="*", default=[1, 2, 4, 8],
                        help="meta-batches whose peak memory is measured, whole and with --task-chunk 1")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--profile", action="store_true", help="print the most expensive operations of our meta-step")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--peak", type=int, nargs=2, metavar=("TASKS", "CHUNK"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


class Setting:
    """One learner, its optimiser and one meta-batch of episodes, shared by the contenders."""

    def __init__(self, args: argparse.Namespace, tasks: int, chunk: int | None = None):
        flags = ["--shots", str(args.shots), "--image-size", str(args.image_size), "--device", args.device,
                 "--threads", str(args.threads)] + (["--task-chunk", str(chunk)] if chunk else [])
        self.args = mini.parse_flags(flags)
        self.device = setup(self.args)
        self.learner = mini.build_learner(self.args, self.device)
        self.optimiser = torch.optim.Adam(self.learner.parameters(), lr=1e-3)
        images = mini.to_tensor(mini.synthetic_split("val", image_size=args.image_size), self.device)
        rng = torch.Generator().manual_seed(0)
        self.batch = mini.sample_episodes(images, tasks, self.args.ways, args.shots, self.args.queries, rng)

    def ours(self) -> None:
        mini.meta_step(self.learner, self.optimiser, self.args, self.batch, None)

    def naive(self) -> None:
        """The same meta-step, one task after the other."""
        theta, psi = self.learner.theta, dict(self.learner.generator.named_parameters())
        self.optimiser.zero_grad(set_to_none=True)
        for support_x, support_y, query_x, query_y in zip(*self.batch):
            support_x, query_x = mini.normalise(support_x), mini.normalise(query_x)
            loss = lambda p: F.cross_entropy(naive.conv4_logits(p, support_x), support_y)
            adapted = naive.adapt_one(loss, theta, self.learner.adapted, psi, self.args.inner_lr, self.args.context_dim,
                                      self.args.rank)
            (F.cross_entropy(naive.conv4_logits(adapted, query_x), query_y) / len(self.batch[0])).backward()
        self.optimiser.step()

    def gradients(self, contender) -> torch.Tensor:
        """The meta-gradient of everything in one vector; the weights are put back."""
        state = self.learner.state()
        contender()
        self.learner.load(state)
        return torch.cat([p.grad.flatten() for p in self.learner.parameters()])


def check_agreement(setting: Setting) -> float:
    """Norm of the difference of the two meta-gradients relative to their norm; raises if they disagree.

    In float32 the two sum in different orders, which now and then flips a ReLU or the winner of a pool: a few 1e-3 of the
    norm are seen, 1e-5 where none flips. In float64 tests/test_modgrad.py holds them to 1e-10.
    """
    ours, theirs = setting.gradients(setting.ours), setting.gradients(setting.naive)
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error < 0.02:
        raise RuntimeError(f"the contenders disagree: their meta-gradients differ by {error:.1e} of the norm")
    return error


class FlopCounter(TorchDispatchMode):
    """Sum of PyTorch's own operation counts; its FlopCounterMode also hooks modules, which autograd.grad does not bear."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.flops += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def seconds(run, device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def quantiles(values: list[float]) -> dict[str, float]:
    low, median, high = torch.tensor(values).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    return {"p20": low, "median": median, "p80": high}


def multiply_rate(device: torch.device, n: int = 2048) -> float:
    """FLOP/s of a float32 matrix product, the machine's practical ceiling."""
    a = torch.randn(n, n, device=device)
    a @ a
    return 2 * n**3 / min(seconds(lambda: a @ a, device) for _ in range(5))


def peak_memory(args: argparse.Namespace, tasks: int, chunk: int) -> int:
    """Peak bytes of a fresh process that runs two of our meta-steps."""
    flags = ["--peak", str(tasks), str(chunk), "--shots", str(args.shots), "--image-size", str(args.image_size),
             "--device", args.device, "--threads", str(args.threads)]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def print_peak(args: argparse.Namespace) -> None:
    setting = Setting(args, args.peak[0], args.peak[1])
    for _ in range(2):
        setting.ours()
    if setting.device.type == "cuda":
        print(torch.cuda.max_memory_allocated())
    else:
        import resource
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024))


def measure(args: argparse.Namespace) -> dict:
    setting = Setting(args, args.meta_batch)
    figures = {"command": "python benchmark.py " + " ".join(sys.argv[1:]), **describe_machine(setting.device),
               "threads": torch.get_num_threads(), "meta_batch": args.meta_batch, "shots": args.shots,
               "image_size": args.image_size, "images": "synthetic", "gradient_difference": check_agreement(setting)}
    with FlopCounter() as counter:
        setting.ours()
    times = {"ours": [], "naive": []}
    for _ in range(args.repeats):                                # interleaved, so that noise hits both alike
        for name, taken in times.items():
            taken.append(seconds(getattr(setting, name), setting.device) / args.meta_batch)
    for name, taken in times.items():
        figures[f"{name}_seconds_per_episode"] = quantiles(taken)
    ratios = [a / b for a, b in zip(times["ours"], times["naive"])]
    flops, rate = counter.flops / args.meta_batch, multiply_rate(setting.device)
    figures |= {"ratio": quantiles(ratios), "gflop_per_episode": flops / 1e9, "matmul_gflops": rate / 1e9,
                "share_of_matmul_rate": flops / figures["ours_seconds_per_episode"]["median"] / rate}
    figures["peak_memory_bytes"] = {
        str(tasks): {"whole": peak_memory(args, tasks, tasks), "task_chunk_1": peak_memory(args, tasks, 1)}
        for tasks in args.memory}
    if args.profile:
        with torch.profiler.profile() as profile:
            setting.ours()
        print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))
    return figures


def report(figures: dict) -> None:
    line = lambda q: f"{q['median']:.3f}  [{q['p20']:.3f}, {q['p80']:.3f}]"
    print(f"{figures['device_name']}, {figures['threads']} thread(s), torch {figures['versions']['torch']}; 5-way "
          f"{figures['shots']}-shot Conv-4 at {figures['image_size']} pixels, meta-batch {figures['meta_batch']}")
    print(f"meta-gradients differ by {figures['gradient_difference']:.1e} of their norm")
    print(f"seconds per episode, median [20 %, 80 %]: ours {line(figures['ours_seconds_per_episode'])}, naive "
          f"{line(figures['naive_seconds_per_episode'])}; ratio {line(figures['ratio'])}")
    print(f"{figures['gflop_per_episode']:.1f} GFLOP an episode at {figures['share_of_matmul_rate']:.0%} of the measured "
          f"matrix-multiply rate of {figures['matmul_gflops']:.0f} GFLOP/s")
    for tasks, peak in figures["peak_memory_bytes"].items():
        print(f"peak memory, meta-batch {tasks}: {peak['whole'] / 2**30:.2f} GiB whole, "
              f"{peak['task_chunk_1'] / 2**30:.2f} GiB with --task-chunk 1")


def main() -> None:
    args = parse_flags()
    if args.peak:
        return print_peak(args)
    figures = measure(args)
    report(figures)
    if args.json:
        save_atomically(args.json, lambda file: file.write(json.dumps(figures, indent=1).encode()))


if __name__ == "__main__":
    run_main(main)
