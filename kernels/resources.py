"""Compiles the Triton kernels for GPUs that are not there and reports what the machine code takes.

    python -m kernels.resources                                      # sm_80 and sm_90, Conv-4 and WRN sizes
    python -m kernels.resources --json results/kernels-resources.json

The launchers run as they are, with Triton told of an absent GPU and each launch turned into a compilation (`warmup`). The
machine code is then read with cuobjdump out of the Triton package. Registers are per thread (128 of them let four programs
of 128 threads share a multiprocessor), stack and spills must be 0, wide accesses are those of 128 bits.
"""

import argparse
import contextlib
import functools
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

from kernels.stem import first_blocks

source = importlib.import_module("kernels.modulate")         # the package's attribute of that name is the function
block, stem = (importlib.import_module(f"kernels.{name}_gpu") for name in ("block", "stem"))
KERNELS = ("_forward_kernel", "_backward_kernel", "_shared_backward_kernel", "_double_backward_kernel", "_sum_kernel")
SIZES = {"conv4": [(192, 192), (1, 64)], "wrn": [(1920, 1920)]}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability: int):
        self.capability = capability

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability                   # the key of Triton's cache: no real device has this number

    def get_current_stream(self, device):
        return 0


class Recorder:
    """Stands in for a kernel: a launch compiles it and keeps the machine code."""

    def __init__(self, kernel, compiled: list):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        return lambda *args, **options: self.compiled.append(
            (self.kernel.fn.__name__, self.kernel.warmup(*args, grid=grid, **options).asm["cubin"]))


def compile_all(capability: int, dtype: torch.dtype, shapes) -> list:
    """Return [(kernel name, machine code)] of a forward, backward and double backward with all cotangents.

    capability: 80 for sm_80, 90 for sm_90. shapes: [(n1, n2), ...], the matrices of one launch.
    """
    compiled = []

    def of_shape(*shape):
        return torch.zeros(2, *shape, dtype=dtype)

    matrices = tuple(of_shape(*shape) for shape in shapes)
    rows, cols = tuple(of_shape(n1) for n1, _ in shapes), tuple(of_shape(n2) for _, n2 in shapes)
    with contextlib.ExitStack() as patches:
        cache = patches.enter_context(tempfile.TemporaryDirectory())
        patches.enter_context(mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}))
        patches.enter_context(mock.patch.object(source.triton.runtime.driver, "_active", AbsentGpu(capability)))
        for name in KERNELS:
            recorder = Recorder(getattr(source, name), compiled)
            patches.enter_context(mock.patch.object(source, name, recorder))
        source._launch_forward(-1, tuple(m[:1].expand_as(m) for m in matrices), matrices, rows, cols)
        for shared in (False, True):
            source._launch_backward(-1, (shared,) * len(shapes), matrices, matrices, rows, cols)
        source._launch_double_backward(-1, matrices, matrices, rows, cols, matrices, rows, cols)
    return compiled


def compile_network(capability: int, precision: str, side: int = 21) -> list:
    """Return [(kernel name, machine code)] of Conv-4's first and of a further block with both orders of derivatives, 64 channels,
    3 tasks of 25 images; precision: "fp32", "tf32" or "bf16"; side: of the further block's planes."""
    compiled, dtype = [], torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.zeros(3, 25, 64, side, side, dtype=dtype, requires_grad=True)
    weight = torch.zeros(3, 64, 64, 3, 3, dtype=dtype, requires_grad=True)
    gamma = torch.zeros(3, 64, requires_grad=True)
    images, filters = torch.zeros(3, 25, 3, 84, 84, dtype=dtype), torch.zeros(3, 64, 3, 3, 3, requires_grad=True)
    with contextlib.ExitStack() as patches:
        cache = patches.enter_context(tempfile.TemporaryDirectory())
        patches.enter_context(mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache}))
        patches.enter_context(mock.patch.object(source.triton.runtime.driver, "_active", AbsentGpu(capability)))
        patches.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        for module in (block, stem):
            patches.enter_context(mock.patch.object(module, "precision", functools.partial(block.precision, gpu=True)))
            for name in dir(module):
                if name.endswith("_kernel"):
                    patches.enter_context(mock.patch.object(module, name, Recorder(getattr(module, name), compiled)))
        for y, inputs in ((block.task_blocks(x, weight, gamma, gamma), [x, weight, gamma]),
                          (first_blocks(images, filters, gamma, gamma), [filters, gamma])):
            first = torch.autograd.grad(y, inputs, torch.zeros_like(y).requires_grad_(), create_graph=True)
            torch.autograd.grad(first, inputs, first, allow_unused=True)
    return list(dict(reversed(compiled)).items())             # of each kernel the first form


def usage(cubin: bytes) -> dict:
    """Return the registers and stack and local bytes of a thread, and counts of spill and 128-bit instructions."""
    tool = source.triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        text = {flag: subprocess.run([tool, flag, str(path)], capture_output=True, text=True, check=True).stdout
                for flag in ("-res-usage", "-sass")}
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text["-res-usage"])
    count = {key: len(re.findall(pattern, text["-sass"])) for key, pattern in (
        ("spills", r"\b(?:LDL|STL)\b"), ("wide_loads", r"\bLDG\S*\.128"), ("wide_stores", r"\bSTG\S*\.128"))}
    return {"registers": int(found[1]), "stack": int(found[2]), "local": int(found[3]), **count}


def show(row: dict) -> None:
    print(f"{row['gpu']:8}{row['dtype']:10}{row['size']:9}{row['kernel']:26}{row['registers']:>10}{row['stack']:>7}"
          f"{row['spills']:>8}{row['wide_loads']:>13}, {row['wide_stores']}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    if source.triton is None or os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("error: compiling needs Triton, with its interpreter off (TRITON_INTERPRET unset)")
    rows = []
    print(f"{'GPU':8}{'dtype':10}{'size':9}{'kernel':26}{'registers':>10}{'stack':>7}{'spills':>8}{'wide loads, stores':>20}")
    for capability in (80, 90):
        for dtype in DTYPES:
            for size, shapes in SIZES.items():
                for name, cubin in dict(compile_all(capability, DTYPES[dtype], shapes)).items():
                    row = {"gpu": f"sm_{capability}", "dtype": dtype, "size": size, "kernel": name[1:-7], **usage(cubin)}
                    rows.append(row)
                    show(row)
        for precision in ("fp32", "tf32", "bf16"):
            for name, cubin in compile_network(capability, precision):
                row = {"gpu": f"sm_{capability}", "dtype": precision, "size": "network", "kernel": name[1:-7], **usage(cubin)}
                rows.append(row)
                show(row)
    if args.json:
        command = "python -m kernels.resources " + " ".join(sys.argv[1:])
        versions = {"torch": torch.__version__, "triton": source.triton.__version__}
        args.json.write_text(json.dumps({"command": command, **versions, "kernels": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
