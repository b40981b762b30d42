"""Convolution and batch norm with closed-form double backward: against PyTorch's own, finite differences, in every layout."""

import functools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from kernels import batch_norm, conv2d, layers
from runs import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gradcheck, gradgradcheck = (functools.partial(check, nondet_tol=1e-10) for check in (gradcheck, gradgradcheck))     # cuDNN's sums
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}


def plain_conv2d(x, weight, bias, groups=1):
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=groups)


def plain_batch_norm(x, gamma, beta):
    return F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-5)


def tensors(op, layout="contiguous", dtype=torch.float64, shape=(3, 4, 5, 6), groups=1, device=DEVICE):
    g = torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=g, dtype=torch.float64)
    x = (normal(*shape) + 0.3).contiguous(memory_format=LAYOUTS[layout])
    rest = [normal(6, shape[1] // groups, 3, 3), normal(6)] if "conv" in op else [normal(shape[1]), normal(shape[1])]
    return [t.to(device, dtype).requires_grad_() for t in (x, *rest)]


def two_orders(op, inputs):
    """The output, its gradient, and the gradient of a function of that gradient, for fixed cotangents."""
    y = op(*inputs)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).reshape(y.shape)
    first = torch.autograd.grad((y.square() * weight).sum(), inputs, create_graph=True)
    return [y, *first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]


OPS = {"conv": (conv2d, plain_conv2d), "batch norm": (batch_norm, plain_batch_norm)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_both_orders_equal_pytorchs_own(op, layout):
    ours, theirs = OPS[op]
    for a, b in zip(two_orders(ours, tensors(op, layout)), two_orders(theirs, tensors(op, layout))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)     # the same sums in another order


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolution_against_finite_differences(layout, groups):
    inputs = tensors("conv", layout, shape=(2, 4, 3, 4), groups=groups)
    op = lambda *args: conv2d(*args, groups)
    assert gradcheck(op, inputs) and gradgradcheck(op, inputs)


@pytest.mark.parametrize("size, stride, groups", [(1, 2, 1), (1, 1, 2), (3, 2, 1), (3, 2, 2), (7, 2, 1), (5, 3, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_convolution_of_any_odd_size_and_stride(layout, size, stride, groups):
    """The output is PyTorch's; with a stride the last rows and columns may go unread, in either parity of the plane."""
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(DEVICE)
    x = normal(2, 4, 5, 6).contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    weight, bias = normal(2, 4 // groups, size, size).requires_grad_(), normal(2).requires_grad_()
    op = lambda *args: conv2d(*args, groups, stride)
    torch.testing.assert_close(op(x, weight, bias), F.conv2d(x, weight, bias, stride, size // 2, groups=groups))
    assert gradcheck(op, (x, weight, bias)) and gradgradcheck(op, (x, weight, bias))


def test_strided_1x1_convolutions_of_few_channels_write_nowhere_else():
    """oneDNN's own weight gradient of them corrupts the heap on CPUs with AVX2: fewer than 8 channels, channels-last."""
    program = """
import torch
from kernels import conv2d
torch.manual_seed(0)
x = torch.randn(16, 5, 8, 8).contiguous(memory_format=torch.channels_last)
weight = torch.randn(8, 5, 1, 1, requires_grad=True)
for _ in range(300):
    weight.grad = None
    conv2d(x, weight, stride=2).square().sum().backward()
    others = [torch.randn(n) for n in range(100, 3000, 150)]
expected = torch.autograd.grad(torch.nn.functional.conv2d(x.double(), weight.double(), stride=2).square().sum(), weight)[0]
torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-3)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_batch_norm_against_finite_differences(layout):
    inputs = tensors("batch norm", layout, shape=(2, 3, 3, 4))
    assert gradcheck(batch_norm, inputs) and gradgradcheck(batch_norm, inputs)


def test_convolution_without_bias():
    x, weight, _ = tensors("conv", shape=(2, 4, 3, 4))
    assert gradcheck(conv2d, (x, weight)) and gradgradcheck(conv2d, (x, weight))


def test_statistics_of_many_channels_last_numbers_keep_float32_precision():
    """PyTorch's own channels-last kernel is off by 1e-4 here."""
    x = (torch.randn(75, 2, 84, 84, generator=torch.Generator().manual_seed(0)) + 1).contiguous(memory_format=torch.channels_last)
    exact = plain_batch_norm(x.double(), torch.ones(2).double(), torch.zeros(2).double())
    ours = batch_norm(x, torch.ones(2), torch.zeros(2))
    assert (ours - exact).abs().max() <= 1e-5        # entries up to 5, a variance right to 1e-6


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("asked", [(0,), (1,), (2,), (0, 1), (1, 2)], ids=str)
def test_any_subset_of_the_inputs_may_be_differentiated(op, asked):
    inputs = [t.detach() for t in tensors(op, shape=(2, 3, 3, 4))]
    chosen = [inputs[k].clone().requires_grad_() for k in asked]

    def function(*given):
        full = list(inputs)
        for k, t in zip(asked, given):
            full[k] = t
        return OPS[op][0](*full)
    assert gradcheck(function, chosen) and gradgradcheck(function, chosen)


def elementary_batch_norm(x, gamma, beta):
    """F.batch_norm's own third derivative is wrong: its double backward takes the saved statistics for constants."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + 1e-5) * gamma[:, None, None] + beta[:, None, None]


@pytest.mark.parametrize("op", OPS)
def test_third_derivatives_are_right_too(op):
    ours, theirs = OPS[op][0], {"conv": plain_conv2d, "batch norm": elementary_batch_norm}[op]

    def third(function):
        inputs = tensors(op, shape=(2, 3, 3, 4))
        y = function(*inputs)
        first = torch.autograd.grad(y.pow(3).sum(), inputs, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), inputs, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in second), inputs)
    for a, b in zip(third(ours), third(theirs)):
        # Cubes of cubes of sums: entries span ten orders of magnitude, so each is held to the largest.
        assert (a - b).abs().max() <= 1e-8 * b.abs().max()


@pytest.mark.parametrize("op", OPS)
def test_16_bit_activations_are_as_good_as_pytorchs_own(op):
    """Error against float64 at most twice that of PyTorch's own formulas in bfloat16, plus one rounding of the largest."""
    ours, theirs = OPS[op]
    exact = two_orders(theirs, tensors(op, "channels-last", shape=(8, 16, 10, 10)))

    def in_16_bit(function):
        inputs = tensors(op, "channels-last", shape=(8, 16, 10, 10))
        dtypes = [torch.bfloat16, *[torch.bfloat16 if op == "conv" else torch.float32] * 2]
        return two_orders(function, [t.detach().to(d).requires_grad_() for t, d in zip(inputs, dtypes)])
    for true, a, b in zip(exact, in_16_bit(ours), in_16_bit(theirs)):
        allowed = 2 * (b.double() - true).abs().max() + torch.finfo(torch.bfloat16).eps * true.abs().max()
        assert (a.double() - true).abs().max() <= allowed


@pytest.mark.parametrize("op", OPS)
def test_gradients_of_channels_last_activations_are_channels_last(op):
    """Mixed layouts cost an order of magnitude in the kernels that follow."""
    x, *rest = tensors(op, "channels-last", device="cpu")            # GPUs get the other layout
    y = OPS[op][0](x, *rest)
    first, = torch.autograd.grad(y.sum() + y.square().sum(), x, torch.tensor(1.0), create_graph=True)
    second, = torch.autograd.grad(first.contiguous().square().sum(), x)
    for t in (y, first, second):
        assert t.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("op", OPS)
def test_vmap_over_tasks(op):
    inputs = [torch.stack([t.detach(), t.detach() + 0.1, 2 * t.detach()]) for t in tensors(op)]
    together = torch.vmap(OPS[op][0])(*inputs)
    for k in range(3):
        torch.testing.assert_close(together[k], OPS[op][1](*(t[k] for t in inputs)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shared", [(), (0,), (1, 2)], ids=["nothing shared", "x shared", "parameters shared"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("op", OPS)
def test_vmap_over_gradients(op, layout, shared):
    inputs = [t.detach() for t in tensors(op, layout)]
    in_dims = tuple(None if k in shared else 0 for k in range(3))
    stacked = [t if k in shared else torch.stack([t, 2 * t]) for k, t in enumerate(inputs)]
    gradient = lambda function: torch.func.grad(lambda *args: function(*args).pow(3).sum(), argnums=(0, 1, 2))
    together = torch.vmap(gradient(OPS[op][0]), in_dims)(*stacked)
    for k in range(2):
        arguments = [t if n in shared else t[k] for n, t in enumerate(stacked)]
        for ours, own in zip(together, gradient(OPS[op][1])(*arguments), strict=True):
            torch.testing.assert_close(ours[k], own, rtol=1e-8, atol=1e-8)


def test_gradients_that_the_pass_does_not_use_are_not_computed(monkeypatch):
    """An inner gradient is that of the weights alone, though the outer one will ask for the activations' too."""
    x, weight, bias = tensors("conv")
    activations, asked, compute = 2 * x, [], layers._ConvBackward.apply
    monkeypatch.setattr(layers._ConvBackward, "apply", lambda *args: asked.append(args[-1]) or compute(*args))
    y = conv2d(activations, 2 * weight, bias).square().sum()
    inner, = torch.autograd.grad(y, weight, create_graph=True)
    assert asked.pop() == [False, True, True] and not asked
    ours = torch.autograd.grad(inner.square().sum(), [x, weight], retain_graph=True)
    inner, = torch.autograd.grad(plain_conv2d(activations, 2 * weight, bias).square().sum(), weight, create_graph=True)
    for a, b in zip(ours, torch.autograd.grad(inner.square().sum(), [x, weight], retain_graph=True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    asked.clear()
    torch.autograd.grad(y, activations)
    assert asked == [[True, True, True]]
