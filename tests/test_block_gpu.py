"""The Triton kernels of Conv-4's blocks: both orders against PyTorch's own layers in float64. Runs on a GPU, or in Triton's
interpreter (tests/test_kernels_interpreter.py), else it is skipped."""

import os

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
from kernels import block_gpu  # noqa: E402
from kernels.block_gpu import convolve, input_gradient, task_blocks, takes_blocks, weight_gradient  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a CUDA device, or Triton's interpreter")
# (H, W), k, C, C'; odd planes, more channels than a step and a tile
CLOSE = 2e-5        # of the norm: 4e-7 seen in the interpreter, 5e-6 of weight gradients on an H200, 1e-3 with one product of TF32
SHAPES = [((5, 4), 3, 16, 16), ((3, 7), 3, 20, 8), ((2, 4), 1, 40, 70), ((3, 2), 5, 16, 5)]


def tensors(size=(5, 4), k=3, channels=16, out=16, shared=False, tasks=2, images=2, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g).to(DEVICE)
    weight = normal(*[tasks] * (not shared), out, channels, k, k) / (channels * k * k) ** 0.5
    return [t.requires_grad_() for t in (normal(tasks, images, channels, *size).to(dtype), weight.to(dtype), normal(out),
                                         normal(out))]


def plain(x, weight, gamma, beta):
    def block(x, weight, gamma, beta):
        y = F.batch_norm(F.conv2d(x, weight, padding=weight.shape[-1] // 2), None, None, gamma, beta, training=True)
        return F.relu(F.max_pool2d(y, 2))
    weights = weight if weight.dim() == 5 else [weight] * len(x)
    return torch.stack([block(a, w, gamma, beta) for a, w in zip(x, weights)])


def ours(x, weight, gamma, beta):
    """gamma and beta as the networks give them: one for all tasks, expanded."""
    return task_blocks(x, weight, gamma.expand(len(x), -1), beta.expand(len(x), -1))


def orders(block, inputs, of=(0, 1, 2, 3)):
    """The output, its gradients, and the gradients of a function of some of these, for fixed cotangents."""
    y = block(*inputs)
    slope = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64).reshape(y.shape).to(y.dtype)
    D = slope.clone().requires_grad_()
    first = torch.autograd.grad(y, inputs, D + y * slope, create_graph=True)
    wave = lambda t: torch.linspace(0, 9, t.numel(), device=t.device, dtype=torch.float64).sin().reshape(t.shape).to(t.dtype)
    function = sum((first[k] * wave(first[k])).sum() for k in of)
    return [y, *first, *torch.autograd.grad(function, [D, *inputs[:3]])]      # beta's is zero but for D's part


def errors(block, inputs, *more):
    exact = orders(plain, [t.detach().double().requires_grad_() for t in inputs], *more)
    return [((a - b).norm() / b.norm()).item() for a, b in zip(orders(block, inputs, *more), exact, strict=True)]


@pytest.mark.parametrize("shape, shared", [(SHAPES[0], True), *zip(SHAPES, (False, False, True, False))], ids=str)
def test_both_orders_have_float32s_accuracy(shape, shared):
    assert max(errors(ours, tensors(*shape, shared))) < CLOSE


@pytest.mark.parametrize("of", [(0,), (1,), (2, 3), (0, 1)], ids=str)
def test_second_derivatives_of_some_gradients_only(of):
    assert max(errors(ours, tensors(), of)) < CLOSE


def test_many_tiles(monkeypatch):
    for name, value in (("ROWS", 16), ("DEPTH", 16), ("FILTERS", 16), ("SPLIT", 32), ("PIXELS", 16), ("CHANNELS", 16)):
        monkeypatch.setattr(block_gpu, name, value)
    assert max(errors(ours, tensors((5, 4), 3, 20, 18))) < CLOSE


def test_16_bits_cost_what_their_rounding_costs():
    inputs = tensors(dtype=torch.bfloat16)
    assert ours(*inputs).dtype == torch.bfloat16
    found = errors(ours, inputs)
    assert all(1e-3 < error < 0.03 for error in found)              # a number is rounded by 4e-3 at most; 0.014 seen


@pytest.mark.parametrize("shared", [True, False])
def test_convolutions(shared):
    x, weight, *_ = (t.detach() for t in tensors(shared=shared))
    G = torch.randn(*x.shape[:2], weight.shape[-4], *x.shape[3:]).to(DEVICE)
    each = weight if weight.dim() == 5 else weight.expand(2, -1, -1, -1, -1)
    last = lambda t: t.movedim(2, -1).contiguous()
    true = [torch.ops.aten.convolution_backward(g, a, w, [0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [True, True, False])
            for g, a, w in zip(G.double(), x.double(), each.double())]
    close = lambda a, b: torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4)
    close(convolve(last(x), weight)[0].movedim(-1, 2), torch.stack([F.conv2d(a, w, padding=1) for a, w in zip(x.double(), each.double())]))
    close(input_gradient(last(G), weight).movedim(-1, 2), torch.stack([t[0] for t in true]))
    dw = torch.stack([t[1] for t in true])
    close(weight_gradient(last(G), last(x), 3, shared), dw.sum(0) if shared else dw)


def test_repeated_runs_agree_bit_for_bit():
    inputs = tensors()
    assert all(map(torch.equal, orders(ours, inputs), orders(ours, inputs)))


def test_a_task_has_the_same_numbers_in_every_batch():
    x, weight, *rest = tensors()
    assert torch.equal(ours(x[1:], weight[1:], *rest)[0], ours(x, weight, *rest)[1])


def test_a_constant_channel_has_no_variance_and_stays_finite():
    inputs = tensors()
    inputs[0] = torch.zeros_like(inputs[0]).requires_grad_()
    assert all(t.isfinite().all() for t in orders(ours, inputs))


def test_nan_is_not_hidden():
    inputs = tensors()
    with torch.no_grad():
        inputs[0][0, 0, 0, 2, 2] = float("nan")
    y = ours(*inputs)
    assert y[0].isnan().any() and not y[1].isnan().any()


def test_what_it_is_for():
    x = tensors()[0]
    capable = DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 0)
    assert takes_blocks(x) == capable and not takes_blocks(x.double()) and not takes_blocks(x[:, :, :3])


def test_tasks_too_large_for_32_bit_places_are_left_to_others(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr("kernels.block_gpu.fits_kernels", lambda dtype, device: True)
    x = torch.zeros(1).expand(2, 2675, 64, 112, 112)
    assert takes_blocks(x[:, :2674]) and not takes_blocks(x)
