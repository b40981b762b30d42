"""Times what follows a convolution in Conv-4, batch norm, max-pool 2 and ReLU: forward, first and second derivatives.

    python -m kernels.blocks --compiled --json results/blocks-cpu.json      # Conv-4's layers on the best device here
    python -m kernels.blocks --images 75

    pytorch     batch norm, ReLU, max-pool, all of PyTorch's own, as MAML codes write it
    closed      as modgrad.py, with closed second derivatives: on a CPU kernels/pooling.py, where the pool comes first; elsewhere,
                and of few numbers, kernels/layers.py's batch norm, then max-pool, then ReLU. Of images modgrad.py takes
                kernels/stem.py instead, where the batch norm joins the convolution
    compile     torch.compile of `pytorch` with its derivatives by torch.func in one graph, if --compiled asks for it:
                compilation takes minutes on a CPU

Each pass starts afresh and holds those before it, so that what the compiler chooses to recompute counts: "second derivatives"
is forward, first and second. Activations are channels-last on a CPU. Before anything is timed every result is compared, as a
whole, with `pytorch` in float64.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F

from kernels.benchmark import time_on_cpu, time_on_gpu, why_not
from kernels.convolutions import SIDES, dtype_of, parser_with_flags, run
from kernels.layers import batch_norm
from kernels.pooling import norm_pool, takes_norm_pool


PASSES = ("forward", "first derivatives", "second derivatives")
TOLERANCE = {"fp32": 1e-2, "tf32": 1e-2, "bf16": 0.3}       # of the norm: where two numbers of a pool, or one and zero, are as
                                                            # good as equal, rounding decides


def pytorch_block(x, gamma, beta):
    """x (N, C, H, W), gamma and beta (C) -> (N, C, H/2, W/2)."""
    return F.max_pool2d(F.relu(F.batch_norm(x, None, None, gamma, beta, training=True)), 2)


def closed_block(x, gamma, beta):
    return norm_pool(x, gamma, beta) if takes_norm_pool(x) else F.relu(F.max_pool2d(batch_norm(x, gamma, beta), 2))


def eager_passes(block: Callable, x, gamma, beta, G, U, p, q) -> dict[str, Callable]:
    """{pass: function} by autograd.grad. G: cotangent of the output; U, p, q: of the first derivatives."""
    inputs, G = [t.detach().requires_grad_() for t in (x, gamma, beta)], G.detach().requires_grad_()
    first = lambda **options: torch.autograd.grad(block(*inputs), inputs, G, **options)
    return {"forward": lambda: [block(*inputs)],
            "first derivatives": first,
            "second derivatives": lambda: torch.autograd.grad(first(create_graph=True), [G, *inputs[:2]], [U, p, q])}


def compiled_passes(block: Callable, *data) -> dict[str, Callable]:
    """The same where torch.compile sees the block and its derivatives as one function."""
    vjp = torch.func.vjp
    first = lambda x, gamma, beta, G: vjp(block, x, gamma, beta)[1](G)

    def second(x, gamma, beta, G, U, p, q):
        to_x, to_gamma, to_G = vjp(lambda x, gamma, G: first(x, gamma, beta, G), x, gamma, G)[1]((U, p, q))
        return to_G, to_x, to_gamma

    def bound(function, arguments):
        compiled = torch.compile(function, fullgraph=True, dynamic=False)
        return lambda: compiled(*arguments)

    return {"forward": bound(lambda *inputs: [block(*inputs)], data[:3]), "first derivatives": bound(first, data[:4]),
            "second derivatives": bound(second, data)}


def make_data(images: int, channels: int, side: int, device: torch.device,
              dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(shape, generator=generator)
    large, small = (images, channels, side, side), (images, channels, side // 2, side // 2)
    data = [normal(*large), 0.5 + torch.rand(channels, generator=generator), normal(channels), normal(*small),
            normal(*large), normal(channels), normal(channels)]
    layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
    return [t.to(device, dtype).contiguous(memory_format=layout) if t.dim() == 4 else t.to(device) for t in data]


def check_agreement(contenders: dict[str, dict[str, Callable]], data: list[torch.Tensor], precision: str = "fp32") -> None:
    """Raise RuntimeError where a result differs from `pytorch` in float64 by more than TOLERANCE of its norm."""
    check_against(eager_passes(pytorch_block, *(t.double() for t in data)), contenders, TOLERANCE[precision])


def check_against(exact: dict[str, Callable], contenders: dict[str, dict[str, Callable]], tolerance: float) -> None:
    """Raise RuntimeError where a tensor of a pass differs from that of `exact`, both {pass: function}, by more than `tolerance` of
    its norm."""
    for name_of_pass, function in exact.items():
        true = function()
        for name, functions in contenders.items():
            for ours, b in zip(functions[name_of_pass](), true, strict=True):
                error = ((ours.double() - b).norm() / b.norm()).item()
                if not error <= tolerance:
                    raise RuntimeError(f"{name}, {name_of_pass}: off by {error:.1e} of the norm; nothing was timed")


def measure(layer: str, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """One row a pass and form for one layer."""
    data = make_data(args.images, args.channels, SIDES[layer], device, dtype_of(args.precision))
    contenders = {"pytorch": eager_passes(pytorch_block, *data), "closed": eager_passes(closed_block, *data)}
    if args.compiled:
        torch.compiler.reset()
        contenders["compile"] = compiled_passes(pytorch_block, *data)
    check_agreement(contenders, data, args.precision)
    timer, rows = time_on_gpu if device.type == "cuda" else time_on_cpu, []
    for name_of_pass in PASSES:
        times = timer({name: of[name_of_pass] for name, of in contenders.items()}, args.seconds)
        for name, (low, median, high) in times.items():
            rows.append({"layer": layer, "pass": name_of_pass, "form": name, "median_ms": median, "p20_ms": low,
                         "p80_ms": high, "times_faster_than_pytorch": times["pytorch"][1] / median})
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = parser_with_flags(__doc__)
    parser.add_argument("--compiled", action="store_true", help="torch.compile too")
    args = parser.parse_args(argv)
    if min(args.images, args.channels, args.threads or 1) < 1:
        parser.error("--images, --channels and --threads must be at least 1")
    if args.compiled and (reason := why_not("compile", torch.device(args.device))):
        parser.error(reason)
    run(args, "kernels.blocks", measure, {"images": args.images, "channels": args.channels,
                                               "precision": args.precision},
        lambda row: f"{row['times_faster_than_pytorch']:.2f} x pytorch")


if __name__ == "__main__":
    main()
