"""Whole meta-steps on mini-ImageNet shapes: this repository against other ways to compute the same thing.

    python benchmark.py                                        # seconds per episode and ratios, memory
    python benchmark.py --scaling --json results/speed-cpu.json    # and how the cost grows; everything into a file
    python benchmark.py --methods modgrad --profile            # and where the time goes

Contenders, all on 5-way 5-shot Conv-4 with the same weights and episodes, forward, all derivatives and Adam included:
  ours         train_miniimagenet.meta_step, on a GPU replayed as a CUDA graph; ours_tf32 and ours_bf16 the same with
               --precision tf32 or bf16, where the device has it
  ours_launched    on a GPU: the same with --no-cuda-graph
  ours_compiled    the same with --compile, if the flag --compiled asks for it: compilation takes minutes on a CPU
  naive        tests/naive.py: the equations over the full network, one task after the other, create_graph=True, as public
               MAML codes do it; naive_tf32 with TF32, which PyTorch's convolutions take on GPUs unless told otherwise;
               naive_bf16 under torch.autocast
  naive_stock  on a CPU: naive in a process of its own whose memory allocator is left as it comes, as published codes run
  higher, torchopt    second-order MAML in these libraries (pip install higher==0.2.1 torchopt==0.7.3), where installed
Their meta-gradients are compared before anything is timed; then they take turns, one meta-step each, so that noise hits
all alike. Images are synthetic: speed does not depend on what they show.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections import OrderedDict
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import common
import train_miniimagenet as mini
from common import HelpFormatter, UsageError, describe_machine, positive_int, run_main, save_atomically, setup
from kernels.products import has_onednn
from tests import naive

WARM_UP = 2         # after the comparison of gradients: the first steps of a process wait for memory from the system
FLOAT64 = 1e-8      # allowed difference of two meta-gradients, relative to their norm, in float64: rounding leaves 1e-14
FLOAT32 = 0.5       # and in float32, where rounding flips ReLUs and winners of pools, at which the gradient jumps: 1e-5 where
                    # none flips, 0.02 to 0.2 seen after five steps. What this number lets pass, the one above does not
BF16_EXCESS = 1.5   # ours in bfloat16 may be this much further from float32 than PyTorch's autocast is


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--methods", nargs="*", choices=("modgrad", "maml"), default=["modgrad", "maml"],
                        help="whose meta-steps are timed beside others'; none: only memory and --scaling")
    parser.add_argument("--maml-steps", type=positive_int, nargs="+", default=[1, 5], help="inner steps of MAML")
    parser.add_argument("--meta-batch", type=positive_int, default=3, help="tasks per meta-step of ModGrad (MAML: 1)")
    parser.add_argument("--shots", type=positive_int, default=5)
    parser.add_argument("--image-size", type=positive_int, default=84)
    parser.add_argument("--channels", type=positive_int, default=64)
    parser.add_argument("--repeats", type=positive_int, default=5, help="timed meta-steps of each contender")
    parser.add_argument("--memory", type=positive_int, nargs="*", default=[1, 2, 4, 8],
                        help="meta-batches whose peak memory is measured, whole and with --task-chunk 1")
    parser.add_argument("--compiled", action="store_true", help="time the compiled meta-step too")
    parser.add_argument("--scaling", action="store_true",
                        help="time and memory as tasks, shots, inner steps, modulated layers and rank grow")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=positive_int, default=1)
    parser.add_argument("--profile", action="store_true", help="print the most expensive operations of our meta-step")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


# --- contenders ------------------------------------------------------------------------------------------------------

def training_flags(args: argparse.Namespace, *more: str) -> list[str]:
    """Flags of train_miniimagenet.py for the sizes of this benchmark; later ones win."""
    sizes = ("shots", "image_size", "channels", "device", "threads")
    return [word for name in sizes for word in (f"--{name.replace('_', '-')}", str(getattr(args, name)))] + list(more)


class Setting:
    """One learner, its optimiser and one meta-batch of episodes; each contender is a method that takes a meta-step."""

    def __init__(self, flags: list[str], tasks: int, dtype: torch.dtype = torch.float32):
        self.args = mini.parse_flags(flags)
        self.device = setup(self.args)
        try:
            learner = mini.build_learner(self.args, self.device)
        except ValueError as error:
            raise UsageError(str(error)) from None
        self.learner = learner._replace(theta={name: nn.Parameter(t.detach().to(dtype)) for name, t in learner.theta.items()},
                                        generator=learner.generator and learner.generator.to(dtype))
        self.optimiser = mini.make_optimiser(self.learner, self.args, self.device)
        images = mini.to_tensor(mini.synthetic_split("val", image_size=self.args.image_size), self.device)
        rng = torch.Generator().manual_seed(0)
        self.batch = mini.sample_episodes(images, tasks, self.args.ways, self.args.shots, self.args.queries, rng)
        self.made = {}          # what compiling or recording made, which takes its time

    def ours(self, **flags) -> None:
        args = argparse.Namespace(**vars(self.args) | flags)
        key = tuple(flags.items())
        if key not in self.made:
            self.made[key] = mini.make_gradient(self.learner, args, self.device)
        mini.meta_step(self.learner, self.optimiser, args, self.batch, None, gradient=self.made[key])

    def ours_launched(self) -> None:
        self.ours(cuda_graph=False)

    def ours_tf32(self) -> None:
        with tf32():
            self.ours(precision="tf32")

    def ours_bf16(self) -> None:
        self.ours(precision="bf16")

    def ours_compiled(self) -> None:
        self.ours(compile=True)

    def naive(self) -> None:
        self.one_by_one(self.naive_loss)

    def naive_tf32(self) -> None:
        with tf32():
            self.naive()

    def naive_bf16(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16):
            self.one_by_one(self.naive_loss)

    def higher(self) -> None:
        self.one_by_one(self.higher_loss)

    def torchopt(self) -> None:
        self.one_by_one(self.torchopt_loss)

    def one_by_one(self, task_loss) -> None:
        """A meta-step that looks at one task after the other."""
        self.optimiser.zero_grad(set_to_none=True)
        for support_x, support_y, query_x, query_y in zip(*self.batch):
            loss = task_loss(mini.normalise(support_x), support_y, mini.normalise(query_x), query_y)
            (loss / len(self.batch[0])).backward()
        self.optimiser.step()

    def naive_loss(self, support_x, support_y, query_x, query_y) -> torch.Tensor:
        theta, a = self.learner.theta, self.args
        psi = dict(self.learner.generator.named_parameters()) if self.learner.generator else None
        loss = lambda p: F.cross_entropy(naive.conv4_logits(p, support_x), support_y)
        adapted = naive.adapt_one(loss, theta, self.learner.adapted, psi, a.inner_lr, a.context_dim, a.rank, a.inner_steps)
        return F.cross_entropy(naive.conv4_logits(adapted, query_x), query_y)

    def higher_loss(self, support_x, support_y, query_x, query_y) -> torch.Tensor:
        import higher
        inner = torch.optim.SGD([self.learner.theta[name] for name in self.learner.adapted], lr=self.args.inner_lr)
        with higher.innerloop_ctx(self.module(), inner, copy_initial_weights=False) as (net, optimiser):
            for _ in range(self.args.inner_steps):
                optimiser.step(F.cross_entropy(net(support_x), support_y))
            return F.cross_entropy(net(query_x), query_y)

    def torchopt_loss(self, support_x, support_y, query_x, query_y) -> torch.Tensor:
        import torchopt
        net = self.module()
        adapted = nn.ModuleList(getattr(net, layer) for layer in {name.split(".")[0]: 0 for name in self.learner.adapted})
        optimiser = torchopt.MetaSGD(adapted, lr=self.args.inner_lr)
        for _ in range(self.args.inner_steps):
            optimiser.step(F.cross_entropy(net(support_x), support_y))
        return F.cross_entropy(net(query_x), query_y)

    def module(self) -> nn.Sequential:
        """The same network as a module over the learner's own parameters, so that gradients arrive there."""
        theta, layers = self.learner.theta, OrderedDict()
        for k in range(1, 5):
            out, into = theta[f"conv{k}.weight"].shape[:2]
            layers[f"conv{k}"] = nn.Conv2d(into, out, 3, padding=1)
            layers[f"norm{k}"] = nn.BatchNorm2d(out, track_running_stats=False)
            layers |= {f"relu{k}": nn.ReLU(), f"pool{k}": nn.MaxPool2d(2)}
        layers |= {"flatten": nn.Flatten(), "head": nn.Linear(*reversed(theta["head.weight"].shape))}
        for name, t in theta.items():
            layer, kind = name.split(".")
            setattr(layers[layer], kind, t)
        return nn.Sequential(layers)

    def gradients(self, contender: str) -> torch.Tensor:
        """The meta-gradient of everything in one vector; the weights are put back."""
        state = self.learner.state()
        getattr(self, contender)()
        self.learner.load(state)
        return torch.cat([p.grad.flatten() for p in self.learner.parameters()])


@contextlib.contextmanager
def tf32():
    """Matrix products and convolutions in TF32, as `common.setup` does for --precision tf32."""
    common.allow_tf32(True)
    try:
        yield
    finally:
        common.allow_tf32(False)


def contenders(method: str, device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Names of those that can run here, and of the others with the reason."""
    names, absent = ["ours", "naive"], {}
    if device.type == "cuda":
        names += ["ours_launched", "naive_tf32", "ours_tf32"]
    bf16 = torch.cuda.is_bf16_supported() if device.type == "cuda" else torch.cpu._is_avx512_bf16_supported()
    for name in ("naive_bf16", "ours_bf16"):        # this order: the first is the measure of the second
        names.append(name) if bf16 else absent.update({name: "no bfloat16 arithmetic on this device"})
    for name in ("higher", "torchopt") if method == "maml" else ():
        names.append(name) if importlib.util.find_spec(name) else absent.update({name: "not installed"})
    return names, absent


def is_exact(name: str) -> bool:
    return not any(word in name for word in ("tf32", "bf16", "compiled"))


def check_agreement(setting: Setting, small: Setting, names: list[str]) -> dict[str, float]:
    """Norm of each contender's difference from the naive meta-gradient relative to its norm; raises if one is too large.

    `small` is the same in float64 on small images, where all contenders but the compiled one, that are of full precision, must
    agree to rounding.
    """
    wide = functools.partial(mini.normalise, dtype=torch.float64)
    with mock.patch.object(mini, "normalise", lambda x, dtype=None: wide(x)):
        for name, error in differences(small, [n for n in names if is_exact(n)]).items():
            if not error <= FLOAT64:
                raise RuntimeError(f"{name} disagrees: in float64 its meta-gradient is off by {error:.1e} of its norm")
    errors = differences(setting, names)
    for name, error in errors.items():
        allowed = FLOAT32 if name != "ours_bf16" else 0.1 + BF16_EXCESS * errors["naive_bf16"]
        if not error <= allowed and name != "naive_bf16":
            raise RuntimeError(f"{name} disagrees: its meta-gradient is off by {error:.1e} of its norm, {allowed:.1e} is allowed")
    return errors


def differences(setting: Setting, names: list[str]) -> dict[str, float]:
    reference = setting.gradients("naive")
    return {name: ((setting.gradients(name) - reference).norm() / reference.norm()).item() for name in names}


# --- measuring -------------------------------------------------------------------------------------------------------

def flop_counts() -> dict:
    """{operation: function to count its operations}: PyTorch's, and those of oneDNN's products, which it leaves out."""
    if not has_onednn():
        return flop_registry
    return flop_registry | {
        torch.ops.mkldnn._linear_pointwise: lambda a, b, *_, out_val: 2 * math.prod(a.shape) * len(b),
        torch.ops.mkldnn._convolution_pointwise:                                                              # of groups, 1 x 1
            lambda x, weight, bias, padding, stride, dilation, groups, *_, out_val: 2 * out_val.numel() * x.shape[1] // groups,
        torch.ops.aten.mkldnn_linear_backward_weights: lambda G, x, *_, out_val: 2 * math.prod(x.shape) * G.shape[1]}


class FlopCounter(TorchDispatchMode):
    """Sum of the operation counts; PyTorch's FlopCounterMode also hooks modules, which autograd.grad does not bear."""

    def __init__(self):
        super().__init__()
        self.flops, self.counts = 0, flop_counts()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        count = self.counts.get(function._overloadpacket)
        self.flops += count(*args, **(kwargs or {}), out_val=out) if count else 0
        return out


def count_flops(flags: list[str]) -> dict[str, float]:
    """GFLOP of one episode, counted on a CPU, where all are PyTorch's operations. One task alone, as PyTorch counts the gradients of
    grouped convolutions too high."""
    setting, counts = Setting([*flags, "--device", "cpu"], 1), {}
    for name, run in (("ours", setting.ours_launched), ("naive", setting.naive)):
        with FlopCounter() as counter:
            run()
        counts[name] = counter.flops / 1e9
    return counts


def timed(run, device: torch.device) -> dict[str, float]:
    """Seconds on the clock and of this process's own CPU time, which other programs on the machine inflate less."""
    start, cpu = time.perf_counter(), time.process_time()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}


def quantiles(values: list[float]) -> dict[str, float]:
    low, median, high = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return {"p20": low, "median": median, "p80": high}


def rate_clock(device_type: str) -> str:
    """On a CPU rates are per second of one core, which neither other programs nor more threads change much."""
    return "cpu_seconds" if device_type == "cpu" else "seconds"


def multiply_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of a matrix product, which our convolutions are held against; on a GPU one that is long beside its launch."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    timed(lambda: a @ a, device)
    return 2e-9 * n**3 / min(timed(lambda: a @ a, device)[rate_clock(device.type)] for _ in range(10))


def peak_memory(device: torch.device) -> int | None:
    """Peak bytes of this process: on the GPU allocated, else resident."""
    status = Path("/proc/self/status")      # on Linux getrusage's figure starts at the parent's
    if device.type == "cpu" and status.exists():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])
    return common.peak_memory_bytes(device)


class Worker:
    """A contender in a process of its own that takes a meta-step when asked to and answers with its time and memory."""

    def __init__(self, contender: str, flags: list[str], tasks: int, stock: bool = False):
        request = {"contender": contender, "flags": flags, "tasks": tasks, "stock": stock}
        self.process = subprocess.Popen([sys.executable, __file__, "--worker", json.dumps(request)], text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()

    def step(self) -> dict[str, float]:
        with contextlib.suppress(BrokenPipeError):             # then there is no answer either
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        if not (answer := self.process.stdout.readline()):
            raise RuntimeError(f"a worker ended with status {self.process.wait()}: {self.process.args[-1]}")
        return json.loads(answer)


class Here:
    """On a GPU the same in this process, as the peak of its memory can be reset and a start takes longer than what is timed."""

    def __init__(self, contender: str, flags: list[str], tasks: int):
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.setting = Setting(flags, tasks)
        self.run = getattr(self.setting, contender)

    def __enter__(self) -> "Here":
        return self

    def __exit__(self, *_) -> None:
        del self.setting, self.run

    def step(self) -> dict[str, float]:
        return timed(self.run, self.setting.device) | {"peak_memory_bytes": peak_memory(self.setting.device)}


def worker(contender: str, flags: list[str], tasks: int, device: torch.device) -> Worker | Here:
    return (Here if device.type == "cuda" else Worker)(contender, flags, tasks)


def serve(request: dict) -> None:
    """The other end of Worker."""
    if request["stock"]:
        common.keep_freed_memory = lambda: None
    setting = Setting(request["flags"], request["tasks"])
    for _ in sys.stdin:
        taken = timed(getattr(setting, request["contender"]), setting.device)
        print(json.dumps(taken | {"peak_memory_bytes": peak_memory(setting.device)}), flush=True)


def measure_case(args: argparse.Namespace, method: str, steps: int) -> dict:
    """Time all contenders of one method in turns."""
    tasks = args.meta_batch if method == "modgrad" else 1      # MAML's graphs are large, and no peer shares work over tasks
    flags = training_flags(args, "--method", method, "--inner-steps", str(steps))
    torch.compiler.reset()      # the compiler keeps eight forms of one function at most, and each case has its own
    setting = Setting(flags, tasks)
    names, absent = contenders(method, setting.device)
    names += ["ours_compiled"] * args.compiled
    small = Setting([*flags, "--image-size", str(min(32, args.image_size))], 1, torch.float64)
    errors = check_agreement(setting, small, names)
    on_cpu = setting.device.type == "cpu"
    times = {name: [] for name in (*names, *["naive_stock"] * on_cpu)}
    with Worker("naive", flags, tasks, stock=True) if on_cpu else contextlib.nullcontext() as stock:
        for k in range(WARM_UP + args.repeats):
            for name, taken in times.items():
                step = stock.step() if name == "naive_stock" else timed(getattr(setting, name), setting.device)
                taken += [step] if k >= WARM_UP else []
    if args.profile:
        with torch.profiler.profile() as profile:
            timed(setting.ours_launched, setting.device)
        order = f"self_{'cpu' if on_cpu else 'device'}_time_total"
        print(profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60))
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None          # what else the machine was doing
    return {"method": method, "inner_steps": steps, "load_average": load, "meta_batch": tasks, "absent": absent,
            "trainable_numbers": sum(p.numel() for p in setting.learner.parameters()), "gflop_per_episode": count_flops(flags),
            "contenders": {name: summary(name, times, tasks) | {"gradient_difference": errors.get(name, errors["naive"])}
                           for name in times}}


def summary(name: str, times: dict[str, list[dict]], tasks: int) -> dict:
    """Quantiles of one contender's seconds per episode, and of our time over its in the same turn."""
    figures = {}
    for clock in ("seconds", "cpu_seconds"):
        taken = [turn[clock] for turn in times[name]]
        figures[f"{clock}_per_episode"] = quantiles([t / tasks for t in taken])
        for mine in (other for other in times if other.startswith("ours")):
            figures[f"{mine}_over_this_{clock}"] = quantiles([turn[clock] / t for turn, t in zip(times[mine], taken)])
    return figures


def measure_memory(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, int]]:
    """Peak bytes of our meta-step by meta-batch, whole and one task at a time; on a CPU each in a fresh process."""
    peaks = {}
    for tasks in args.memory:
        for key, chunk in (("whole", tasks), ("task_chunk_1", 1)):
            with worker("ours", training_flags(args, "--task-chunk", str(chunk)), tasks, device) as one:
                peaks.setdefault(str(tasks), {})[key] = [one.step() for _ in range(2)][-1]["peak_memory_bytes"]
    return peaks


def measure_throughput(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, dict]]:
    """{meta-batch: {contender: seconds and peak bytes}} of ModGrad, of the meta-batches whose memory is measured."""
    results = {}
    for tasks in args.memory:
        for name in ("ours", "ours_launched", "ours_tf32", "ours_bf16"):
            with worker(name, training_flags(args), tasks, device) as one:
                results.setdefault(str(tasks), {})[name] = time_steps(one, args.repeats, tasks)
    return results


def time_steps(one: Worker | Here, repeats: int, tasks: int) -> dict:
    steps = [one.step() for _ in range(WARM_UP + repeats)][WARM_UP:]
    return {clock + "_per_episode": quantiles([s[clock] / tasks for s in steps]) for clock in ("seconds", "cpu_seconds")} | {
        "peak_memory_bytes": steps[-1]["peak_memory_bytes"]}


def measure_scaling(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, dict]]:
    """{what grows: {to: seconds and peak bytes}} of ModGrad, one thing at a time, the rest as in the paper, one task."""
    last = lambda n: ["--adapt", *(f"conv{k}.{kind}" for k in range(5 - n, 5) for kind in ("weight", "bias"))]
    points = {"tasks": {n: (n, []) for n in (1, 2, 4, 8)},
              "shots": {n: (1, ["--shots", str(n)]) for n in (1, 5, 20)},
              "inner steps": {n: (1, ["--inner-steps", str(n)]) for n in (1, 2, 3, 5)},
              "modulated convolutions (the last n)": {n: (1, last(n)) for n in (1, 2, 3, 4)},
              "columns u": {n: (1, ["--rank", str(n)]) for n in (1, 5, 10)}}
    results = {}
    for what, values in points.items():
        for value, (tasks, more) in values.items():
            with worker("ours", training_flags(args, *more), tasks, device) as one:
                results.setdefault(what, {})[str(value)] = time_steps(one, min(args.repeats, 5), tasks)
    return results


def measure(args: argparse.Namespace) -> dict:
    """All that the flags ask for; the file is written after each part, so that a run cut short leaves what it has."""
    device = setup(mini.parse_flags(training_flags(args)))
    figures = {"command": "python benchmark.py " + " ".join(sys.argv[1:]), **describe_machine(device),
               "device": device.type, "threads": torch.get_num_threads(), "cpus": os.cpu_count(),
               "cpu_capability": torch.backends.cpu.get_cpu_capability(),
               "shots": args.shots, "image_size": args.image_size, "channels": args.channels, "images": "synthetic",
               "repeats": args.repeats, "cases": [], "peak_memory_bytes": {}, "scaling": {},
               "matmul_gflops": {}}
    for method in args.methods:
        for steps in args.maml_steps if method == "maml" else (1,):
            for name in ("float32", "bfloat16"):            # the best between all cases: other programs may be in the way once
                rate = multiply_rate(device, getattr(torch, name))
                figures["matmul_gflops"][name] = max(rate, figures["matmul_gflops"].get(name, 0.0))
            figures["cases"].append(measure_case(args, method, steps))
            save(args, figures)
    figures["throughput"] = measure_throughput(args, device) if device.type == "cuda" else {}
    save(args, figures)
    figures["peak_memory_bytes"] = {} if device.type == "cuda" else measure_memory(args, device)       # throughput has it there
    save(args, figures)
    figures["scaling"] = measure_scaling(args, device) if args.scaling else {}
    save(args, figures)
    return figures


def save(args: argparse.Namespace, figures: dict) -> None:
    if args.json:
        save_atomically(args.json, lambda file: file.write(json.dumps(figures, indent=1).encode()))


# --- report ----------------------------------------------------------------------------------------------------------

LINKS = {"1 Gbit/s Ethernet": (125e6, 50e-6), "10 Gbit/s Ethernet": (1.25e9, 30e-6), "NVLink, 450 GB/s": (450e9, 5e-6)}


def data_parallel(case: dict) -> str:
    """Where training on many devices saturates, from the measured step and the bytes of its gradient.

    n devices make the meta-batch n times larger; keeping the paper's 3 tasks, no more than 3 can work. Assumes: each of n
    devices takes the measured meta-batch in the measured time; then a ring all-reduce of 4 bytes per trainable number,
    nothing overlapped: 2 (n - 1) / n bytes / bandwidth + 2 (n - 1) latency. Links: bytes/s and seconds per hop as in LINKS,
    nominal, not measured.
    """
    bytes_, tasks = 4 * case["trainable_numbers"], case["meta_batch"]
    step = min(c["seconds_per_episode"]["median"] for name, c in case["contenders"].items() if "ours" in name) * tasks
    lines = [f"{tasks} task(s) a device and step in {step:.3g} s; {bytes_ / 1e6:.1f} MB all-reduced"]
    for link, (bandwidth, latency) in LINKS.items():
        reduce = lambda n: 2 * (n - 1) / n * bytes_ / bandwidth + 2 * (n - 1) * latency
        half = 1 + max(0.0, step - 2 * bytes_ / bandwidth) / (2 * latency)     # reduce(n) = step, for large n
        lines.append(f"  {link}: 100 devices {100 * tasks / (step + reduce(100)):.3g} tasks/s, "
                     f"{step / (step + reduce(100)):.1%} of ideal; half of the time is communication at {half:,.0f} devices")
    return "\n".join(lines)


def report(figures: dict) -> None:
    line = lambda q: f"{q['median']:.3f} [{q['p20']:.3f}, {q['p80']:.3f}]"
    print(f"{figures['device_name']}, {figures['threads']} thread(s), torch {figures['versions']['torch']}; 5-way "
          f"{figures['shots']}-shot Conv-4 at {figures['image_size']} pixels; median [20 %, 80 %] of {figures['repeats']}")
    for case in figures["cases"]:
        clock = f"{rate_clock(figures['device'])}_per_episode"
        flops, ours = case["gflop_per_episode"], case["contenders"]["ours"][clock]["median"]
        rate = figures["matmul_gflops"]["float32"]
        print(f"\n{case['method']}, {case['inner_steps']} inner step(s), meta-batch {case['meta_batch']}: {flops['ours']:.1f} "
              f"GFLOP an episode (naive {flops['naive']:.1f}), ours at {flops['ours'] / ours / rate:.0%} of the matrix-multiply "
              f"rate of {rate:.0f} GFLOP/s")
        for name, c in case["contenders"].items():
            ratios = ", ".join(f"{mine} / this {line(c[f'{mine}_over_this_seconds'])}" for mine in ("ours", "ours_tf32", "ours_bf16")
                               if f"{mine}_over_this_seconds" in c)
            print(f"  {name:12} {line(c['seconds_per_episode'])} s/episode (CPU {c['cpu_seconds_per_episode']['median']:.3f}); "
                  f"{ratios}; gradient off by {c['gradient_difference']:.0e}")
        for name, why in case["absent"].items():
            print(f"  {name:12} not timed: {why}")
    for tasks, peak in figures["peak_memory_bytes"].items():
        print(f"peak memory, meta-batch {tasks}: {peak['whole'] / 2**30:.2f} GiB whole, "
              f"{peak['task_chunk_1'] / 2**30:.2f} GiB with --task-chunk 1")
    for tasks, of in figures["throughput"].items():
        print(f"meta-batch {tasks}: " + "; ".join(f"{name} {1 / p['seconds_per_episode']['median']:.1f} episodes/s, "
                                                  f"{p['peak_memory_bytes'] / 2**30:.2f} GiB" for name, p in of.items()))
    for what, points in figures["scaling"].items():
        print(f"{what}: " + "; ".join(f"{value}: {p['seconds_per_episode']['median']:.3g} s/episode, "
                                      f"{p['peak_memory_bytes'] / 2**30:.2f} GiB" for value, p in points.items()))
    for case in figures["cases"][:1]:
        print(f"\nmany devices, by arithmetic: {data_parallel(case)}")


def main() -> None:
    args = parse_flags()
    if args.worker:
        return serve(args.worker)
    report(measure(args))


if __name__ == "__main__":
    run_main(main)
