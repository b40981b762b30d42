"""Times the ways to convolve with weights of each task's own: forward, first and second derivatives.

    python -m kernels.convolutions --json results/convolutions-cpu.json    # Conv-4's layers on the best device here
    python -m kernels.convolutions --tasks 8 --images 75 --device cuda

After the first inner step every task has its own filters, T of them, each for its N images:
    loop            one convolution after the other                   loop-last       the same, channels-last
    grouped         one convolution of T groups on (N, T C, H, W)     grouped-last    the same, channels-last
    unfold          patches as columns, then one batched matrix product
    pytorch-last    loop-last by PyTorch's own convolution and derivatives
    triton          on a GPU: kernels/block_gpu.py, all tasks in one launch
Each form keeps the activations in its own layout, as between the blocks of a network; no copy into it is counted. The first four
use kernels/layers.py, with its closed derivatives and, on some CPUs, Winograd's algorithm. What modgrad.py takes: loop-last on
CPUs; on GPUs triton for Conv-4 and grouped for the residual networks.

Every result is compared with `loop` in float64 before anything is timed. GFLOP/s count the 2 T N C C' k k H W operations of a
forward pass once, of the first derivatives (both inputs) twice, of the second (three inputs, two terms for one) four times, also
where Winograd's algorithm needs fewer.
"""

import argparse
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F

from common import allow_tf32, keep_freed_memory
from kernels.benchmark import describe, own_stream, select_device, time_on_cpu, time_on_gpu, write_json
from kernels.block_gpu import task_convolution
from kernels.layers import conv2d

SIDES = {"conv1": 84, "conv2": 42, "conv3": 21, "conv4": 10}                    # H = W of each convolution at 84 pixels
PASSES = {"forward": 1, "first derivatives": 2, "second derivatives": 4}                  # convolutions of each
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}      # of the largest entry: float32 sums over up to N H W = 176,400
                                                            # terms leave 1e-6 to 1e-5; the others are rounded before each product


class Form(NamedTuple):
    """pack: (T, N, C, H, W) -> list of tensors in this form's layout; unpack: back; apply: packed x, w -> packed y."""
    pack: Callable
    unpack: Callable
    apply: Callable


def _last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _side_by_side(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(0, 1).flatten(1, 2).contiguous()                                          # (N, T C, H, W)


def forms(tasks: int, gpu: bool = False) -> dict[str, Form]:
    """The contenders for `tasks` tasks; weights are (T, C', C, k, k) for all."""
    def unfold(xs, w):
        x, = xs                                                                                  # (T, N, C, H, W)
        columns = F.unfold(x.flatten(0, 1), w.shape[-1], padding=w.shape[-1] // 2)               # (T N, C k k, H W)
        y = w.flatten(2).unsqueeze(1) @ columns.unflatten(0, x.shape[:2])                        # (T, N, C', H W)
        return [y.unflatten(-1, x.shape[-2:])]

    loop = lambda xs, w: [conv2d(x, v) for x, v in zip(xs, w.unbind())]
    pytorch = lambda xs, w: [F.conv2d(x, v, padding=v.shape[-1] // 2) for x, v in zip(xs, w.unbind())]
    grouped = lambda xs, w: [conv2d(xs[0], w.flatten(0, 1), groups=tasks)]
    apart = lambda ys: ys[0].unflatten(1, (tasks, -1)).transpose(0, 1)
    return {"loop": Form(lambda x: [t.contiguous() for t in x], torch.stack, loop),
            "loop-last": Form(lambda x: [_last(t) for t in x], torch.stack, loop),
            "grouped": Form(lambda x: [_side_by_side(x)], apart, grouped),
            "grouped-last": Form(lambda x: [_last(_side_by_side(x))], apart, grouped),
            "unfold": Form(lambda x: [x.contiguous()], lambda ys: ys[0], unfold),
            "pytorch-last": Form(lambda x: [_last(t) for t in x], torch.stack, pytorch),
            **({"triton": Form(lambda x: [x.movedim(2, -1).contiguous()], lambda ys: ys[0].movedim(-1, 2),
                               lambda xs, w: [task_convolution(xs[0], w)])} if gpu else {})}


def passes(form: Form, x, w, G, U, V) -> dict[str, Callable]:
    """{pass: function} of one form. x, U (T, N, C, H, W), w, V (T, C', C, k, k), G (T, N, C', H, W): input, weights,
    cotangent of the output; U, V: cotangents of the first derivatives. Results come unpacked, in the forms' common layout.
    """
    xs, G, U = ([t.requires_grad_() for t in form.pack(t.detach())] for t in (x, G, U))
    w = w.detach().requires_grad_()
    y = form.apply(xs, w)
    first = torch.autograd.grad(y, [*xs, w], G, create_graph=True)
    return {"forward": lambda: form.apply(xs, w),
            "first derivatives": lambda: torch.autograd.grad(y, [*xs, w], G, retain_graph=True),
            "second derivatives": lambda: torch.autograd.grad(first, [*G, *xs, w], [*U, V], retain_graph=True)}


def unpacked(form: Form, name_of_pass: str, results, parts: int) -> list[torch.Tensor]:
    """The tensors of a pass in the common layout: y; or dx, dw; or to G, to x, to w. `parts`: tensors of a packed x."""
    groups, results = [], list(results)
    for _ in range({"forward": 1, "first derivatives": 1, "second derivatives": 2}[name_of_pass]):
        groups.append(form.unpack(results[:parts]))
        results = results[parts:]
    return groups + results


def check_agreement(contenders: dict[str, Form], data: list[torch.Tensor], precision: str = "fp32") -> None:
    """Raise RuntimeError where a form's result differs from `loop` in float64 by more than TOLERANCE of the largest entry."""
    loop = contenders["loop"]
    exact = passes(loop, *(t.double() for t in data))
    for name, form in contenders.items():
        ours, parts = passes(form, *data), len(form.pack(data[0]))
        for name_of_pass in PASSES:
            true = unpacked(loop, name_of_pass, exact[name_of_pass](), len(data[0]))
            for a, b in zip(unpacked(form, name_of_pass, ours[name_of_pass](), parts), true, strict=True):
                error = ((a.double() - b).abs().max() / b.abs().max()).item()
                if not error <= TOLERANCE[precision]:
                    raise RuntimeError(f"{name}, {name_of_pass}: off by {error:.1e} of the largest entry; nothing was timed")


def make_data(layer: tuple[int, int, int], tasks: int, images: int, device: torch.device,
              dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    channels, out, side = layer
    generator = torch.Generator().manual_seed(0)
    x, w = (tasks, images, channels, side, side), (tasks, out, channels, 3, 3)
    shapes = x, w, (tasks, images, out, side, side), x, w
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def measure(name: str, args: argparse.Namespace, device: torch.device) -> list[dict]:
    """One row a pass and form for one layer."""
    channels, out, side = layer = 3 if name == "conv1" else args.channels, args.channels, SIDES[name]
    data = make_data(layer, args.tasks, args.images, device, dtype_of(args.precision))
    contenders = forms(args.tasks, device.type == "cuda")
    check_agreement(contenders, data, args.precision)
    functions = {form: passes(contenders[form], *data) for form in contenders}
    timer, rows = time_on_gpu if device.type == "cuda" else time_on_cpu, []
    for name_of_pass, convolutions in PASSES.items():
        times = timer({form: of[name_of_pass] for form, of in functions.items()}, args.seconds)
        flops = convolutions * 2 * args.tasks * args.images * channels * out * 9 * side**2
        for form, (low, median, high) in times.items():
            rows.append({"layer": name, "pass": name_of_pass, "form": form, "median_ms": median, "p20_ms": low,
                         "p80_ms": high, "gflops": flops / median / 1e6, "times_faster_than_loop": times["loop"][1] / median})
    return rows


def dtype_of(precision: str) -> torch.dtype:
    return torch.bfloat16 if precision == "bf16" else torch.float32


def parser_with_flags(description: str) -> argparse.ArgumentParser:
    """The flags that this command and `python -m kernels.blocks` share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--layers", nargs="+", choices=tuple(SIDES), default=list(SIDES), help="of Conv-4 at 84 pixels")
    parser.add_argument("--channels", type=int, default=64, help="C', and C but of images")
    parser.add_argument("--images", type=int, default=25, help="N, images of a task (25: 5 ways, 5 shots)")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--precision", choices=tuple(TOLERANCE), default="fp32", help="tf32: on GPUs, float32 with products of "
                        "10-bit mantissas")
    parser.add_argument("--seconds", type=float, default=2.0, help="time spent on each figure")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


def run(args: argparse.Namespace, module: str, measure: Callable, more: dict, figures: Callable) -> None:
    """Measure all layers, print a table and write it with `more` into the JSON file, after each layer: a run cut short
    leaves what it has. figures: row -> its text after the times."""
    if args.threads:
        torch.set_num_threads(args.threads)
    allow_tf32(args.precision == "tf32")
    keep_freed_memory()                                      # as the training scripts do
    device = select_device(args.device)
    about, rows = describe(device, module) | more, []
    print(f"{about['device']}, torch {about['torch']}, {about['threads']} thread(s); "
          + ", ".join(f"{what} {value}" for what, value in more.items()))
    for name in args.layers:
        with own_stream(device):
            measured = measure(name, args, device)
        for row in measured:
            rows.append(row)
            spread = f"{row['median_ms']:.2f} ms ({row['p20_ms']:.2f}, {row['p80_ms']:.2f})"
            print(f"{row['layer']:12}{row['pass']:20}{row['form']:14}{spread:>34}  {figures(row)}", flush=True)
        if args.json:
            write_json(args.json, {**about, "rows": rows})


def main(argv: list[str] | None = None) -> None:
    parser = parser_with_flags(__doc__)
    parser.add_argument("--tasks", type=int, default=3, help="T (3: the released code's meta-batch)")
    args = parser.parse_args(argv)
    if min(args.tasks, args.images, args.channels, args.threads or 1) < 1:
        parser.error("--tasks, --images, --channels and --threads must be at least 1")
    run(args, "kernels.convolutions", measure, {"tasks": args.tasks, "images": args.images, "channels": args.channels,
                                                "precision": args.precision},
        lambda row: f"{row['gflops']:6.1f} GFLOP/s, {row['times_faster_than_loop']:.2f} x loop")


if __name__ == "__main__":
    main()
