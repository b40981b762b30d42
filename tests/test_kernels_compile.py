"""Every kernel compiles for real GPUs, without one: no spilled registers, 128-bit accesses.

The launchers run as they are, with Triton told of a GPU that is not there and each launch turned into a
compilation (`warmup`). The machine code is then read with the tools inside the Triton package.
"""

import importlib
import os
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from triton.backends.compiler import GPUTarget  # noqa: E402

source = importlib.import_module("kernels.modulate")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: its kernels cannot be compiled", allow_module_level=True)

KERNELS = ["_forward_kernel", "_backward_kernel", "_double_backward_kernel", "_sum_kernel"]
# n1 x n2 accesses (reads, writes) of each kernel that must all be 128 bits wide
MATRICES = {"_forward_kernel": (2, 1), "_backward_kernel": (2, 1), "_double_backward_kernel": (3, 2)}
CONV4, WIDE_RESNET = [(192, 192), (1, 64)], [(1920, 1920)]


class AbsentGpu:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability                   # the key of Triton's cache: no real device has this number

    def get_current_stream(self, device):
        return 0


class Recorder:
    """Stands in for a kernel: a launch compiles it and keeps the machine code."""

    def __init__(self, kernel, compiled):
        self.kernel, self.compiled = kernel, compiled

    def __getitem__(self, grid):
        return lambda *args, **options: self.compiled.append(
            (self.kernel.fn.__name__, self.kernel.warmup(*args, grid=grid, **options).asm["cubin"]))


def compile_all(monkeypatch, tmp_path, capability, dtype, shapes):
    """Return [(kernel name, machine code)] of a forward, backward and double backward with all cotangents."""
    compiled = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", AbsentGpu(capability))
    for name in KERNELS:
        monkeypatch.setattr(source, name, Recorder(getattr(source, name), compiled))

    def of_shape(*shape):
        return torch.zeros(2, *shape, dtype=dtype)

    matrices = tuple(of_shape(*shape) for shape in shapes)
    rows, cols = tuple(of_shape(n1) for n1, _ in shapes), tuple(of_shape(n2) for _, n2 in shapes)
    source._launch_forward(-1, tuple(m[:1].expand_as(m) for m in matrices), matrices, rows, cols)
    source._launch_backward(-1, matrices, matrices, rows, cols)
    source._launch_double_backward(-1, matrices, matrices, rows, cols, matrices, rows, cols)
    return compiled


def report(cubin, tmp_path):
    """Return counts of stack bytes, local bytes, spill instructions, wide loads and wide stores."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    tool = triton.knobs.nvidia.cuobjdump.path
    text = {flag: subprocess.run([tool, flag, str(path)], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")}
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text["-res-usage"])
    count = {key: len(re.findall(pattern, text["-sass"])) for key, pattern in (
        ("spills", r"\b(?:LDL|STL)\b"), ("wide loads", r"\bLDG\S*\.128"), ("wide stores", r"\bSTG\S*\.128"))}
    return {"registers": int(usage[1]), "stack": int(usage[2]), "local": int(usage[3]), **count}


@pytest.mark.parametrize("shapes", [CONV4, WIDE_RESNET], ids=["conv4", "wide-resnet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_no_spills_and_wide_accesses(capability, dtype, shapes, monkeypatch, tmp_path):
    compiled = compile_all(monkeypatch, tmp_path, capability, dtype, shapes)
    assert [name for name, _ in compiled] == [KERNELS[k] for k in (0, 1, 3, 2, 3)]
    for name, cubin in compiled:
        seen = report(cubin, tmp_path)
        assert seen["stack"] == seen["local"] == seen["spills"] == 0, f"{name}: {seen}"
        # 128 registers let four programs of 128 threads share the 65,536 of a multiprocessor.
        assert seen["registers"] <= 128, f"{name}: {seen}"
        reads, writes = MATRICES.get(name, (0, 0))
        per_access = 2 if dtype == torch.float32 else 1           # a thread's 8 elements of a 16 x 64 tile
        assert seen["wide loads"] >= reads * per_access, f"{name}: {seen}"
        assert seen["wide stores"] >= writes * per_access, f"{name}: {seen}"


def test_a_tile_that_is_too_large_is_seen_to_spill(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "_block", lambda n1, n2: (64, 256, 1))
    source._plan.cache_clear()
    compiled = compile_all(monkeypatch, tmp_path, 90, torch.float32, WIDE_RESNET)
    source._plan.cache_clear()
    seen = report(dict(compiled)["_double_backward_kernel"], tmp_path)
    assert seen["stack"] > 0 and seen["spills"] > 0, seen
