"""Times the modulated step: forward, backward, double backward and a whole inner step, in every form.

    python -m kernels.benchmark --json results/kernels.json      # the paper's sizes on the best device here
    python -m kernels.benchmark --sizes wrn --tasks 4 16 --dtype bfloat16
    python -m kernels.benchmark --quick                          # Conv-4 only, under a minute

Contenders: `eager` (the plain formula), `addcmul` (plain PyTorch with one temporary less), `closed` (closed forms of
the derivatives in PyTorch operations, what CPU tensors get), `compile` (torch.compile of the formula,
differentiated inside the compiled function), `triton` (all tensors of a
network in one launch) and `triton-single` (one launch per tensor). Triton is timed on a GPU only: its
interpreter is no measure of speed.

Before anything is timed every result is compared with the formula in float64: its error may be at most twice
that of `eager` in the same dtype plus one unit of rounding of the largest entry, times sqrt(n) for a sum of n
terms, which the forms add in different orders (roundings then walk at random).

Bytes are those a perfectly fused form must move (`model_bytes`); GB/s is that number divided by the median
time, and the share is against a plain copy of as many bytes, timed in the same run. On a GPU the L2 cache is
flushed before every repetition. `T` counts tasks; theta is shared by all, as in the first inner step. A whole inner
step has a linear layer where the network is, and its matrix products count in the time of every contender.
"""

import argparse
import contextlib
import itertools
import json
import os
import platform
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Callable, NamedTuple

import torch

from common import keep_freed_memory
from kernels.modulate import modulated_step, modulated_step_reference, resolve_backend, triton

BIASES = [(1, 64), (1, 64)]
SIZES = {                                # the tensors that ModGrad adapts in each network of the paper
    "conv4": [(192, 192), (192, 192), *BIASES],             # 64 x 64 x 3 x 3 as (3 * 64) x (3 * 64)
    "conv4-natural": [(64, 576), (64, 576), *BIASES],       # the same as 64 x (64 * 3 * 3)
    "resnet34": [(1536, 1536), (1536, 1536)],               # 512 x 512 x 3 x 3
    "wrn": [(1920, 1920), (1920, 1920)],                    # 640 x 640 x 3 x 3
    "wrn-natural": [(640, 5760)],
}
SAMPLES = 16                             # of the linear layers that stand for a network in the inner step
PASSES = ("forward", "backward", "double backward", "inner step")
CONTENDERS = ("eager", "addcmul", "closed", "compile", "triton", "triton-single")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(NamedTuple):
    """Lists with one tensor per adapted tensor of a network; G, X, p and q are cotangents."""

    theta: list                          # (n1, n2)
    grad: list                           # (T, n1, n2)
    row: list                            # (T, n1)
    col: list                            # (T, n2)
    G: list                              # (T, n1, n2)  of y
    X: list                              # (T, n1, n2)  of d_grad
    p: list                              # (T, n1)      of d_row
    q: list                              # (T, n2)      of d_col
    images: list                         # (n2, SAMPLES)  what the network between two steps reads


# --- the contenders ---------------------------------------------------------------------------------------

def eager_step(theta, grad, row, col) -> list:
    return [modulated_step_reference(*entry) for entry in zip(theta, grad, row, col)]


def addcmul_step(theta, grad, row, col) -> list:
    return [torch.addcmul(t, torch.relu(a[:, :, None] * b[:, None, :]), g, value=-1)
            for t, g, a, b in zip(theta, grad, row, col)]


def closed_step(theta, grad, row, col) -> list:
    return modulated_step(theta, grad, row, col, kernel="closed")


def triton_step(theta, grad, row, col) -> list:
    return modulated_step(theta, grad, row, col, kernel="triton")


def triton_single_step(theta, grad, row, col) -> list:
    return [modulated_step(*entry, kernel="triton") for entry in zip(theta, grad, row, col)]


def autograd_passes(step: Callable, case: Case) -> dict:
    """Return {pass: function} that differentiate `step` as the training scripts do, with autograd.grad."""
    case = Case(*([t.detach().requires_grad_() for t in group] for group in case))
    inputs = case[:4]
    leaves = [tensor for group in inputs for tensor in group]
    y = step(*inputs)
    first = torch.autograd.grad(y, case.grad + case.row + case.col, case.G, create_graph=True)

    def inner_step():
        trial = step(*inputs)
        moved = torch.autograd.grad(trial, case.row + case.col, _loss_gradient(trial, case.images), create_graph=True)
        row, col = _moved(case.row, case.col, moved)
        return torch.autograd.grad(step(case.theta, case.grad, row, col), leaves, case.G)

    return {
        "forward": lambda: step(*inputs),
        "backward": lambda: torch.autograd.grad(y, leaves, case.G, retain_graph=True),
        "double backward": lambda: torch.autograd.grad(first, case.G + case.grad + case.row + case.col,
                                                       case.X + case.p + case.q, retain_graph=True),
        "inner step": inner_step,
    }


def _loss_gradient(trial, images) -> list:
    """Gradients with respect to y of the losses |y x|^2 / 2. A network lies between the two steps, and no compiler can fuse them
    across it; this one of linear layers is the least of networks, and all contenders have the same."""
    return [(y @ x) @ x.mT for y, x in zip(trial, images)]


def _moved(row, col, change) -> tuple:
    """Return the factors less a thousandth of `change`, a stand-in for what the generator does to them."""
    return ([a - 1e-3 * d for a, d in zip(row, change[:len(row)])],
            [b - 1e-3 * d for b, d in zip(col, change[len(row):])])


def compiled_passes(step: Callable, case: Case) -> dict:
    """Return {pass: function} where torch.compile sees `step` and its derivatives as one function."""
    vjp = torch.func.vjp

    def backward(theta, grad, row, col, G):
        return vjp(step, theta, grad, row, col)[1](G)

    def double_backward(theta, grad, row, col, G, X, p, q):
        def first(G, grad, row, col):
            return vjp(lambda *args: step(theta, *args), grad, row, col)[1](G)
        return vjp(first, G, grad, row, col)[1]((X, p, q))

    def inner_step(theta, grad, row, col, G, images):
        def two_steps(theta, grad, row, col):
            trial, pull_back = vjp(lambda row, col: step(theta, grad, row, col), row, col)
            d_row, d_col = pull_back(_loss_gradient(trial, images))
            return step(theta, grad, *_moved(row, col, d_row + d_col))
        return vjp(two_steps, theta, grad, row, col)[1](G)

    def bound(function, arguments):
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        return lambda: compiled(*arguments)

    return {"forward": bound(step, case[:4]), "backward": bound(backward, case[:5]),
            "double backward": bound(double_backward, case[:8]), "inner step": bound(inner_step, (*case[:5], case.images))}


def make_passes(name: str, case: Case) -> dict:
    """Return {pass: function} of a contender, each run once so that compilation is over."""
    if name == "compile":
        torch.compiler.reset()
        passes = compiled_passes(eager_step, case)
    else:
        steps = {"eager": eager_step, "addcmul": addcmul_step, "closed": closed_step,
                 "triton": triton_step, "triton-single": triton_single_step}
        passes = autograd_passes(steps[name], case)
    for function in passes.values():
        function()
    return passes


def why_not(name: str, device: torch.device) -> str | None:
    """Return why a contender cannot be timed on this device, or None."""
    if name.startswith("triton") and device.type != "cuda":
        return "Triton needs a CUDA device; its interpreter is no measure of speed"
    if name == "compile" and device.type == "cpu" and not shutil.which("c++") and not shutil.which("g++"):
        return "torch.compile on a CPU needs a C++ compiler, and neither c++ nor g++ was found"
    return None


# --- agreement --------------------------------------------------------------------------------------------

def make_case(shapes, tasks: int, dtype: torch.dtype, device: torch.device) -> Case:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    def group(kind):
        extents = {"theta": lambda n1, n2: (n1, n2), "matrix": lambda n1, n2: (tasks, n1, n2), "row": lambda n1, n2: (tasks, n1),
                   "col": lambda n1, n2: (tasks, n2), "images": lambda n1, n2: (n2, SAMPLES)}[kind]
        return [normal(*extents(*shape)) for shape in shapes]

    case = Case(*map(group, ("theta", "matrix", "row", "col", "matrix", "matrix", "row", "col", "images")))
    return case._replace(images=[x / len(x) ** 0.5 for x in case.images])


def flat(results) -> list:
    """Return the tensors of nested lists and tuples in order."""
    return [results] if isinstance(results, torch.Tensor) else [t for part in results for t in flat(part)]


def errors_against(exact: list, results) -> list:
    return [(ours.double() - true).abs().max().item() for ours, true in zip(flat(results), exact)]


def rounding_of(exact: torch.Tensor, name_of_pass: str, case: Case) -> float:
    """Return one unit of rounding of the largest entry, times sqrt(n) for a sum of n terms."""
    # Vectors and the gradient of theta are sums; in the inner step everything follows from sums.
    is_sum = exact.dim() == 2 or name_of_pass == "inner step"
    terms = max(max(grad.shape) for grad in case.grad) if is_sum else 1
    return torch.finfo(case.grad[0].dtype).eps * terms ** 0.5 * exact.abs().max().item()


def check_agreement(contenders: dict, case: Case, what: str) -> dict:
    """Return {(contender, pass): largest error over the allowed one}; stop the run if one exceeds 1."""
    in_float64 = autograd_passes(eager_step, Case(*([t.double() for t in group] for group in case)))
    in_same_dtype, ratios = autograd_passes(eager_step, case), {}
    for name_of_pass in PASSES:
        exact = [t.detach() for t in flat(in_float64[name_of_pass]())]
        eager = errors_against(exact, in_same_dtype[name_of_pass]())
        allowed = [2 * error + rounding_of(true, name_of_pass, case) for error, true in zip(eager, exact)]
        for name, passes in contenders.items():
            errors = errors_against(exact, passes[name_of_pass]())
            if len(errors) != len(allowed):
                raise SystemExit(f"{name}, {name_of_pass}, {what}: {len(errors)} results, not {len(allowed)}")
            ratio = max(error / bound for error, bound in zip(errors, allowed))
            if not ratio <= 1:
                raise SystemExit(f"{name}, {name_of_pass}, {what}: an error is {ratio:.2f} of what is "
                                 f"allowed; nothing was timed")
            ratios[name, name_of_pass] = ratio
    return ratios


# --- time -------------------------------------------------------------------------------------------------

def time_on_cpu(functions: dict, seconds: float) -> dict:
    """Return {name: (20 %, 50 %, 80 % quantile in ms)}; the contenders take turns, so drift hits all."""
    samples = {name: [] for name in functions}
    end = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < end or len(next(iter(samples.values()))) < 5:
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            samples[name].append(1e3 * (time.perf_counter() - start))
    deciles = {name: statistics.quantiles(values, n=10) for name, values in samples.items()}
    return {name: (cut[1], cut[4], cut[7]) for name, cut in deciles.items()}


def time_on_gpu(functions: dict, seconds: float) -> dict:
    """Return {name: (20 %, 50 %, 80 % quantile in ms)} by CUDA events, L2 flushed before each.

    Each function is recorded as a CUDA graph, as a training step is: what Python takes to launch it does not count. They
    must run on the stream on which their forward passes ran, one of `own_stream`.
    """
    flushed, deciles = torch.empty(2 ** 28, dtype=torch.uint8, device="cuda"), {}
    for name, function in functions.items():
        graph, samples = torch.cuda.CUDAGraph(), []
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            function()
        end = time.perf_counter() + seconds
        while time.perf_counter() < end or len(samples) < 10:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flushed.zero_()
            start.record()
            graph.replay()
            stop.record()
            stop.synchronize()
            samples.append(start.elapsed_time(stop))
        cut = statistics.quantiles(samples[2:], n=10)
        deciles[name] = cut[1], cut[4], cut[7]
        del graph
    return deciles


def own_stream(device: torch.device):
    """A context in which a GPU computes on a stream that can be recorded; the default one cannot."""
    return torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext()


def model_bytes(shapes, tasks: int, item: int) -> dict:
    """Return {pass: bytes} that a perfectly fused form reads and writes; every gradient is asked for."""
    theta = sum(n1 * n2 for n1, n2 in shapes)
    matrix, vectors = tasks * theta, tasks * sum(n1 + n2 for n1, n2 in shapes)
    forward = 2 * matrix + theta + vectors                           # g, theta, a, b -> y
    backward = 3 * matrix + theta + 2 * vectors                      # G, g, a, b -> d_g, d_theta, d_a, d_b
    context = 2 * matrix + 2 * vectors                               # G, g, a, b -> d_a, d_b
    without_x = 4 * matrix + 3 * vectors                             # G, g, a, b, p, q -> to G, g, a, b
    network = 4 * matrix                                             # y -> G, and the derivative of that
    elements = {"forward": forward, "backward": backward, "double backward": without_x + matrix,
                "inner step": 2 * forward + context + 2 * backward + without_x + network}
    return {name: item * count for name, count in elements.items()}


def copy_function(count: int, device: torch.device) -> Callable:
    """Return a function that moves `count` bytes: half read, half written."""
    source = torch.zeros(max(count // 2, 1), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def measure(size: str, tasks: int, args, device: torch.device, skipped: dict) -> list:
    """Return one row per pass and contender for the tensors of one network."""
    shapes, dtype = SIZES[size], DTYPES[args.dtype]
    case, contenders = make_case(shapes, tasks, dtype, device), {}
    for name in args.contenders:
        if name in skipped:
            continue
        try:
            contenders[name] = make_passes(name, case)
        except Exception as error:       # torch.compile fails in many ways; the table says which, and goes on
            if name != "compile":
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    ratios = check_agreement(contenders, case, f"{size}, T = {tasks}")
    timer, rows = time_on_gpu if device.type == "cuda" else time_on_cpu, []
    for name_of_pass, count in model_bytes(shapes, tasks, case.grad[0].element_size()).items():
        functions = {name: passes[name_of_pass] for name, passes in contenders.items()}
        times = timer({"copy": copy_function(count, device), **functions}, args.seconds)
        copy_ms = times.pop("copy")[1]
        for name, (low, median, high) in times.items():
            rows.append({
                "size": size, "tasks": tasks, "pass": name_of_pass, "contender": name, "median_ms": median,
                "p20_ms": low, "p80_ms": high, "model_bytes": count, "gb_per_s": count / median / 1e6,
                "copy_gb_per_s": count / copy_ms / 1e6, "share_of_copy": copy_ms / median,
                "error_of_allowed": ratios[name, name_of_pass],
                **{f"times_faster_than_{other}": times[other][1] / median
                   for other in ("eager", "compile") if other in times},
            })
    return rows


# --- report -----------------------------------------------------------------------------------------------

def cpu_name() -> str:
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def select_device(name: str) -> torch.device:
    """The device to measure; a GPU becomes the current one, as the timer's events are recorded there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SystemExit(f"error: --device {name!r} is no device: use cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SystemExit(f"error: --device {name}: this machine has {torch.cuda.device_count()} CUDA device(s)")
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    return device


def describe(device: torch.device, module: str = "kernels.benchmark") -> dict:
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else cpu_name(),
        "cpu_capability": None if cuda else torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "cores": os.cpu_count(),
        "auto_backend": resolve_backend("auto", device), "torch": torch.__version__,
        "triton": triton.__version__ if triton else None, "cuda": torch.version.cuda,
        "python": platform.python_version(), "system": platform.platform(),
        "command": shlex.join([Path(sys.executable).name, "-m", module, *sys.argv[1:]]),
    }


def print_table(rows: list) -> None:
    print(f"{'size':14}{'T':>4}  {'pass':16}{'contender':14}{'ms (20 %, 80 %)':>27}{'GB/s':>8}{'of copy':>9}"
          f"{'x eager':>9}{'x compile':>11}{'error':>7}")
    for row in rows:
        spread = f"{row['median_ms']:.4f} ({row['p20_ms']:.4f}, {row['p80_ms']:.4f})"
        ratios = [f"{row[key]:.2f}" if key in row else "-" for key in
                  ("times_faster_than_eager", "times_faster_than_compile")]
        print(f"{row['size']:14}{row['tasks']:>4}  {row['pass']:16}{row['contender']:14}{spread:>27}"
              f"{row['gb_per_s']:>8.1f}{row['share_of_copy']:>9.0%}{ratios[0]:>9}{ratios[1]:>11}"
              f"{row['error_of_allowed']:>7.2f}")


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)


def names_out_of(allowed) -> Callable:
    def parse(text: str) -> list:
        names = text.split(",")
        unknown = [name for name in names if name not in allowed]
        if unknown:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)!r} not among {', '.join(allowed)}")
        return names
    return parse


def parse_flags(argv: list | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=best, help="cpu, cuda or cuda:N; default: a GPU if there is one")
    parser.add_argument("--sizes", type=names_out_of(SIZES), default=list(SIZES),
                        help=f"out of {','.join(SIZES)}")
    parser.add_argument("--contenders", type=names_out_of(CONTENDERS), default=list(CONTENDERS),
                        help=f"out of {','.join(CONTENDERS)}")
    parser.add_argument("--tasks", type=int, nargs="+", default=[4, 16], metavar="T", help="tasks in a batch")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's choice")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--seconds", type=float, default=0.5, help="time spent on each figure")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--quick", action="store_true", help="conv4 with 4 tasks, 0.1 seconds a figure, where nothing else is said")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(sizes=["conv4"], tasks=[4], seconds=0.1)
        args = parser.parse_args(argv)
    if min(args.tasks) < 1:
        parser.error(f"--tasks must be at least 1, got {min(args.tasks)}")
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, got {args.threads}")
    return args


def main() -> None:
    args = parse_flags()
    device = select_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    keep_freed_memory()                  # as the training scripts do: else a CPU mostly waits for pages of fresh memory
    about = describe(device)
    print(f"{about['device']}, torch {about['torch']}, triton {about['triton']}, {about['threads']} threads, "
          f"{args.dtype}; kernel \"auto\" means {about['auto_backend']} here")
    skipped = {name: reason for name in args.contenders if (reason := why_not(name, device))}
    with own_stream(device):
        rows = []
        for size, tasks in itertools.product(args.sizes, args.tasks):
            rows += measure(size, tasks, args, device, skipped)
            if args.json:
                write_json(args.json, {**about, "dtype": args.dtype, "rows": rows, "skipped": skipped})
    print_table(rows)
    for name, reason in skipped.items():
        print(f"not timed: {name}: {reason}")


if __name__ == "__main__":
    main()
