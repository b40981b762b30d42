"""The eager path, the choice of backend, the errors, and the guard that keeps torch.compile right."""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from kernels import (modulate, modulate_reference, modulated_step, modulated_step_reference, resolve_backend)

source = importlib.import_module("kernels.modulate")
ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def tensors(shape=(3, 5), tasks=2, dtype=torch.float64, seed=0):
    """Return theta (shared), grad, row, col that require gradients."""
    generator = torch.Generator().manual_seed(seed)
    shapes = shape, (tasks, *shape), (tasks, shape[0]), (tasks, shape[1])
    return [torch.randn(*s, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
            for s in shapes]


# --- the eager path ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(1, 1), (1, 64), (5, 7)])
def test_values_entry_by_entry(shape):
    theta, grad, row, col = (t.detach() for t in tensors(shape, 3))
    out, alone = modulated_step(theta, grad, row, col), modulate(grad, row, col)
    for t in range(3):
        for i in range(shape[0]):
            for j in range(shape[1]):
                m = max(row[t, i].item() * col[t, j].item(), 0.0)
                assert alone[t, i, j].item() == m * grad[t, i, j].item()
                start, step = theta[i, j].item(), m * grad[t, i, j].item()
                rounding = 2.3e-16 * (abs(start) + abs(step))      # a fused multiply-add rounds once, not twice
                assert abs(out[t, i, j].item() - (start - step)) <= rounding


def test_step_size_folds_into_row():
    theta, grad, row, col = tensors()
    folded = modulated_step(theta, grad, 0.25 * row, col)          # a power of two: exact
    torch.testing.assert_close(folded, theta - 0.25 * modulate(grad, row, col), rtol=0, atol=1e-15)   # a fused multiply-add


@pytest.mark.parametrize("shared", [True, False])
def test_eager_derivatives(shared):
    theta, grad, row, col = tensors()
    theta = theta if shared else theta.detach().expand(2, 3, 5).clone().requires_grad_()
    eager = functools.partial(modulated_step, kernel="eager")
    assert gradcheck(eager, (theta, grad, row, col))
    assert gradgradcheck(eager, (theta, grad, row, col))


def test_closed_formula_of_the_double_backward_equals_autograd():
    # The formula is what third derivatives go through; autograd on the reference is the oracle.
    _, grad, row, col = tensors()
    G, X, p, q = tensors((3, 5), seed=1)
    G = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    for has_x in (True, False):
        y = -modulate_reference(grad, row, col)
        first = torch.autograd.grad(y, (grad, row, col), G, create_graph=True)
        start, weights = (first, (X, p, q)) if has_x else (first[1:], (p, q))
        true = torch.autograd.grad(start, (G, grad, row, col), weights)
        ours = source._double_backward_formula(-1, has_x, G, grad, row, col, *weights)
        for one, other in zip(ours, true):
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)   # 5 float64 terms of order 1


def test_list_form_equals_single_form():
    entries = [tensors(shape, seed=k) for k, shape in enumerate([(3, 5), (1, 4), (2, 2)])]
    thetas, grads, rows, cols = map(tuple, zip(*entries))
    for out, entry in zip(modulated_step(thetas, grads, rows, cols, kernel="eager"), entries):
        assert torch.equal(out, modulated_step_reference(*entry))
    for out, entry in zip(modulate(grads, rows, cols, kernel="eager"), entries):
        assert torch.equal(out, modulate_reference(*entry[1:]))


def test_small_and_large_tensors_of_a_list_take_their_own_form(monkeypatch):
    # 2 x 3 x 5 = 30 and 2 x 6 x 5 = 60 numbers: the first and the last are small, as biases are.
    monkeypatch.setattr(source, "CLOSED_FROM", 40)
    thetas, grads, rows, cols = zip(*(tensors(shape, seed=k) for k, shape in enumerate([(3, 5), (6, 5), (1, 4)])))
    out = modulated_step(thetas, grads, rows, cols)
    assert [y.grad_fn.name() for y in out] == ["AddcmulBackward0", "_ModulateBackward", "AddcmulBackward0"]
    for y, entry in zip(out, zip(thetas, grads, rows, cols)):
        torch.testing.assert_close(y, modulated_step_reference(*entry), rtol=1e-14, atol=1e-14)


# --- the choice of backend --------------------------------------------------------------------------------

def test_backend_without_gpu():
    assert resolve_backend("auto", "cpu") == resolve_backend("closed", "cpu") == "closed"
    assert resolve_backend("eager", "cpu") == "eager"
    assert resolve_backend("eager", "cuda") == "eager"
    assert resolve_backend("auto", torch.device("mps")) == "eager"


def test_backend_on_cuda_is_triton():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert resolve_backend("auto", "cuda") == resolve_backend("triton", "cuda:1") == "triton"


def test_unknown_kernel_is_refused():
    with pytest.raises(ValueError, match="'cutlass'"):
        modulated_step(*tensors(), kernel="cutlass")


@pytest.mark.skipif(INTERPRETED, reason="the interpreter accepts CPU tensors")
def test_triton_on_the_cpu_is_refused():
    pytest.importorskip("triton", reason="Triton is not installed")
    with pytest.raises(RuntimeError, match="got cpu.*TRITON_INTERPRET=1"):
        modulated_step(*tensors(), kernel="triton")


def test_without_triton_installed():
    script = """
import sys
sys.modules["triton"] = None          # makes every import of Triton fail, as where it is not installed
import torch
from kernels import modulate, resolve_backend
assert modulate(torch.ones(1, 2, 3), torch.ones(1, 2), torch.ones(1, 3)).sum() == 6
for kernel, device in (("triton", "cpu"), ("auto", "cuda")):
    try:
        resolve_backend(kernel, device)
    except RuntimeError as error:
        assert "not installed" in str(error), error
    else:
        raise AssertionError("no error for " + kernel)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# --- errors -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, change, error, message", [
    ("theta", lambda t: t[0], ValueError, r"theta must have shape \(3, 5\) or \(2, 3, 5\).*got \(5,\)"),
    ("theta", lambda t: t.expand(4, 3, 5), ValueError, "theta must have shape"),
    ("grad", lambda t: t[0], ValueError, r"grad must have shape \(T, n1, n2\).*got \(3, 5\)"),
    ("grad", lambda t: t[:0], ValueError, "without zeros"),
    ("row", lambda t: t[:, :2], ValueError, r"row must have shape \(2, 3\).*got \(2, 2\)"),
    ("col", lambda t: t[:1], ValueError, r"col must have shape \(2, 5\).*got \(1, 5\)"),
    ("row", lambda t: t.float(), TypeError, "row has dtype torch.float32 beside a grad of torch.float64"),
    ("grad", lambda t: t.int(), TypeError, "dtype"),
    ("col", lambda t: t.to("meta"), ValueError, "col is on meta, grad on cpu"),
    ("row", lambda t: 1.0, TypeError, "row must be a tensor.*float"),
    ("theta", lambda t: [t], TypeError, "theta must be a tensor.*list"),
    ("grad", lambda t: [t], TypeError, "all tensors or all lists"),
], ids=lambda value: value if isinstance(value, str) and value.isalpha() else "")
def test_wrong_arguments(name, change, error, message):
    arguments = dict(zip(("theta", "grad", "row", "col"), (t.detach() for t in tensors())))
    arguments[name] = change(arguments[name])
    with pytest.raises(error, match=message):
        modulated_step(**arguments)


def test_wrong_lists():
    theta, grad, row, col = tensors()
    with pytest.raises(ValueError, match=r"common length.*\[1, 2, 1, 1\]"):
        modulated_step([theta], [grad, grad], [row], [col])
    with pytest.raises(ValueError, match="at least 1"):
        modulate([], [], [])
    with pytest.raises(ValueError, match=r"grad\[1\] holds 1 tasks"):
        modulate([grad, grad[:1]], [row, row[:1]], [col, col[:1]])
    with pytest.raises(ValueError, match=r"col\[1\] must have shape \(2, 5\)"):
        modulate([grad, grad], [row, row], [col, row])


def test_matrix_too_large_for_32_bit_offsets():
    with pytest.raises(ValueError, match="50000 x 50000"):
        source._plan(((50_000, 50_000),))
    with pytest.raises(ValueError, match="fewer tasks"):
        source._launch(None, 2 ** 31, torch.empty(2 ** 15, 0))


# --- torch.compile ----------------------------------------------------------------------------------------

def second_order(step, theta, grad, row, col):
    """Return the gradient of a loss after two steps, the second with factors moved by an inner gradient."""
    inner, = torch.autograd.grad(step(theta, grad, row, col).square().sum(), row, create_graph=True)
    return torch.autograd.grad(step(theta, grad, row - 0.01 * inner, col).square().sum(), row)[0]


def public_step(*arguments):
    return modulated_step(*arguments)


def traced_second_order(monkeypatch):
    config = importlib.import_module("torch._dynamo").config
    if not hasattr(config, "trace_autograd_ops"):
        pytest.skip("this torch cannot trace autograd.grad")
    monkeypatch.setattr(config, "trace_autograd_ops", True)
    torch.compiler.reset()
    compiled = torch.compile(second_order, fullgraph=True, backend="aot_eager")
    return compiled(public_step, *tensors())


def send_the_functions_to_plain_pytorch(monkeypatch):
    """Make `modulated_step` take the hand-written Functions, with launchers that need no GPU."""
    def forward(sign, thetas, grads, rows, cols):
        return tuple(modulated_step_reference(*entry) for entry in zip(thetas, grads, rows, cols))

    def backward(sign, shared, out_grads, grads, rows, cols):
        assert shared == (True,)
        (G,), (g,), (a,), (b,) = out_grads, grads, rows, cols
        product = a[:, :, None] * b[:, None, :]
        m, open_gG = sign * product.relu(), sign * (g * G).masked_fill(product <= 0, 0)
        return G.sum(0), m * G, (open_gG * b[:, None, :]).sum(2), (open_gG * a[:, :, None]).sum(1)

    def double_backward(sign, *groups):
        flat = [tensor for group in groups for tensor in group]
        return source._double_backward_formula(sign, bool(groups[4]), *flat)

    monkeypatch.setattr(source, "resolve_backend", lambda kernel, device: "triton")
    monkeypatch.setattr(source, "_launch_forward", forward)
    monkeypatch.setattr(source, "_launch_backward", backward)
    monkeypatch.setattr(source, "_launch_double_backward", double_backward)


def test_compiled_second_order_equals_eager_only_with_the_guard(monkeypatch):
    true = second_order(modulated_step_reference, *tensors())
    send_the_functions_to_plain_pytorch(monkeypatch)
    torch.testing.assert_close(second_order(public_step, *tensors()), true, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(traced_second_order(monkeypatch), true, rtol=1e-12, atol=1e-12)
    # Without the guard the compiler refuses, or loses the second-order term and says nothing: why it exists.
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: False)
    try:
        unguarded = traced_second_order(monkeypatch)
    except importlib.import_module("torch._dynamo").exc.Unsupported:
        return
    assert (unguarded - true).abs().max() > 0.01 * true.abs().max()


def test_compiled_func_gradients_equal_eager():
    theta, grad, row, col = (t.detach() for t in tensors())

    def second(step):
        inner = torch.func.grad(lambda r: step(theta, grad, r, col).square().sum())
        return torch.func.grad(lambda r: step(theta, grad, r - 0.01 * inner(r), col).square().sum())

    torch.compiler.reset()
    ours = torch.compile(second(public_step), fullgraph=True, backend="aot_eager")(row)
    torch.testing.assert_close(ours, second(modulated_step_reference)(row), rtol=1e-12, atol=1e-12)
