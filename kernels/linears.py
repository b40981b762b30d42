"""Times a linear layer on a CPU, by PyTorch's own product and by oneDNN's (kernels/products.py), and its derivatives.

    python -m kernels.linears --threads 1 --json results/linears-cpu.json

    pytorch     F.linear, and torch.baddbmm where each task has weights of its own
    onednn      the same as oneDNN's products, of any size and on any CPU that has them
    ours        what kernels.linear takes here

GFLOP/s count the 2 T N in out operations of a forward pass once, of the first derivatives (both inputs) twice, of the second
(three inputs, two terms for one) four times. Before anything is timed every result is compared with `pytorch` in float64.
"""

import argparse
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F

from kernels import products
from kernels.benchmark import time_on_cpu
from kernels.blocks import check_against
from kernels.convolutions import PASSES, run
from kernels.products import linear

TOLERANCE = 1e-5        # float32 sums of up to 25,600 terms leave less than 1e-6


class Layer(NamedTuple):
    tasks: int
    rows: int           # of each task
    width: int          # numbers in and out
    shared: bool        # one weight for all tasks


LAYERS = {"pixels": Layer(25, 1024, 128, True), "pixels-own": Layer(25, 1024, 128, False),          # CelebA: the outer loss,
          "given": Layer(25, 100, 128, True), "given-own": Layer(25, 100, 128, False),              # the given pixels
          "policy-own": Layer(20, 2000, 100, False)}                                                # 2D navigation


def pytorch(x, weight, bias):
    return F.linear(x, weight, bias) if weight.dim() == 2 else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def passes(layer: Callable, x, weight, bias, G, U, V) -> dict[str, Callable]:
    """{pass: function}. x, U (T, N, in), weight, V ([T,] out, in), bias ([T,] out), G (T, N, out): G is the cotangent of the
    output, U and V are those of the first derivatives."""
    x, weight, bias, G = (t.detach().requires_grad_() for t in (x, weight, bias, G))
    y = layer(x, weight, bias)
    first = torch.autograd.grad(y, [x, weight], G, create_graph=True)
    return {"forward": lambda: [layer(x, weight, bias)],
            "first derivatives": lambda: torch.autograd.grad(y, [x, weight], G, retain_graph=True),
            "second derivatives": lambda: torch.autograd.grad(first, [G, x, weight], [U, V], retain_graph=True)}


@contextlib.contextmanager
def everywhere():
    """oneDNN's products of all sizes, on this CPU whatever it is."""
    with mock.patch.object(products, "LEAST", {2: 0, 3: 0}), mock.patch.object(products, "is_zen5", lambda: True):
        yield


def by_onednn(functions: dict[str, Callable]) -> dict[str, Callable]:
    def inside(function):
        with everywhere():
            return function()
    return {name: lambda function=function: inside(function) for name, function in functions.items()}


def make_data(layer: Layer) -> list[torch.Tensor]:
    generator, own = torch.Generator().manual_seed(0), () if layer.shared else (layer.tasks,)
    rows, weight = (layer.tasks, layer.rows, layer.width), (*own, layer.width, layer.width)
    return [torch.randn(shape, generator=generator) for shape in (rows, weight, (*own, layer.width), rows, rows, weight)]


def check_agreement(contenders: dict[str, dict[str, Callable]], data: list[torch.Tensor]) -> None:
    """Raise RuntimeError where a result differs from `pytorch` in float64 by more than TOLERANCE of its norm."""
    check_against(passes(pytorch, *(t.double() for t in data)), contenders, TOLERANCE)


def measure(name: str, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """One row a pass and form for one layer."""
    layer, rows = LAYERS[name], []
    data = make_data(layer)
    with everywhere():
        onednn = passes(linear, *data)
    contenders = {"pytorch": passes(pytorch, *data), "onednn": by_onednn(onednn), "ours": passes(linear, *data)}
    check_agreement(contenders, data)
    for name_of_pass, products_of_it in PASSES.items():
        times = time_on_cpu({form: of[name_of_pass] for form, of in contenders.items()}, args.seconds)
        flops = products_of_it * 2 * layer.tasks * layer.rows * layer.width**2
        for form, (low, median, high) in times.items():
            rows.append({"layer": name, "pass": name_of_pass, "form": form, "median_ms": median, "p20_ms": low, "p80_ms": high,
                         "gflops": flops / median / 1e6, "times_faster_than_pytorch": times["pytorch"][1] / median})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=tuple(LAYERS), default=list(LAYERS), help="; ".join(
        f"{name}: {layer.tasks} tasks, {layer.rows} rows, {layer.width} wide" for name, layer in LAYERS.items()))
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each figure")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.set_defaults(device="cpu", precision="fp32")
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error("--threads must be at least 1")
    if not products.has_onednn():
        parser.error("this PyTorch has no oneDNN")
    run(args, "kernels.linears", measure, {"taken": products.is_zen5()},
        lambda row: f"{row['gflops']:6.1f} GFLOP/s, {row['times_faster_than_pytorch']:.2f} x pytorch")


if __name__ == "__main__":
    main()
