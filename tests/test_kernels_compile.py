"""Every kernel compiles for real GPUs, without one: no spilled registers, 128-bit accesses."""

import importlib
import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter is on: its kernels cannot be compiled", allow_module_level=True)

from kernels.resources import KERNELS, SIZES, compile_all, compile_network, usage  # noqa: E402

source = importlib.import_module("kernels.modulate")
# n1 x n2 accesses (reads, writes) of each kernel that must all be 128 bits wide; the tile of the third has twice the size
MATRICES = {"_forward_kernel": (2, 1), "_backward_kernel": (2, 1), "_shared_backward_kernel": (4, 4), "_double_backward_kernel": (3, 2)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("capability", [80, 90])
def test_no_spills_and_wide_accesses(capability, dtype, size):
    compiled = compile_all(capability, dtype, SIZES[size])
    of_shared_theta = 2 if size == "wrn" else 1                # a large matrix, or the sums' kernel
    assert [name for name, _ in compiled] == [KERNELS[k] for k in (0, 1, 4, of_shared_theta, 4, 3, 4)]
    for name, cubin in compiled:
        seen = usage(cubin)
        assert seen["stack"] == seen["local"] == seen["spills"] == 0, f"{name}: {seen}"
        assert seen["registers"] <= 128, f"{name}: {seen}"
        reads, writes = MATRICES.get(name, (0, 0))
        per_access = 2 if dtype == torch.float32 else 1           # a thread's 8 elements of a 16 x 64 tile
        assert seen["wide_loads"] >= reads * per_access, f"{name}: {seen}"
        assert seen["wide_stores"] >= writes * per_access, f"{name}: {seen}"


@pytest.mark.parametrize("capability, precision", [(90, "fp32"), (80, "bf16")])
def test_the_networks_kernels_do_not_spill(capability, precision):
    compiled = compile_network(capability, precision)
    names = {name for name, _ in compiled}
    assert {"_conv_kernel", "_weight_gradient_kernel", "_double_kernel", "_moments_kernel", "_pooled_kernel", "_gradients_kernel"} <= names
    for name, cubin in compiled:
        seen = usage(cubin)
        assert seen["stack"] == seen["local"] == seen["spills"] == 0, f"{name}: {seen}"


def test_a_tile_that_is_too_large_is_seen_to_spill(monkeypatch):
    monkeypatch.setattr(source, "_block", lambda n1, n2: (64, 256, 1))
    source._plan.cache_clear()
    compiled = compile_all(90, torch.float32, SIZES["wrn"])
    source._plan.cache_clear()
    seen = usage(dict(compiled)["_double_backward_kernel"])
    assert seen["stack"] > 0 and seen["spills"] > 0, seen
