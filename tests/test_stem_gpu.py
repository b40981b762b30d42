"""The Triton kernels of the first block: both orders against PyTorch's own layers in float64. Runs on a GPU, or in Triton's
interpreter (tests/test_kernels_interpreter.py), else it is skipped."""

import os

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from kernels import first_blocks, stem, stem_gpu, takes_first_block  # noqa: E402
from test_stem import orders, plain  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs a CUDA device, or Triton's interpreter")
# (H, W), k, C, C'; the last has more filters than one tile
SHAPES = [((9, 8), 3, 3, 5), ((8, 6), 3, 4, 20), ((6, 5), 1, 3, 4), ((7, 11), 3, 2, 16), ((4, 6), 5, 1, 70)]


def tensors(size=(8, 10), k=3, channels=3, out=20, tasks=2, images=3, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=g).to(DEVICE)
    x = (normal(tasks, images, channels, *size) + 0.3).to(dtype)
    return x, [t.requires_grad_() for t in (normal(tasks, out, channels, k, k), normal(tasks, out), normal(tasks, out))]


def each(x, *parameters):
    return torch.stack([plain(*task) for task in zip(x, *parameters)])


def exact(x, parameters):
    return orders(each, x.double(), [p.detach().double().requires_grad_() for p in parameters])


def errors(block, x, parameters):
    return [((a - b).norm() / b.norm()).item() for a, b in zip(orders(block, x, parameters), exact(x, parameters), strict=True)]


@pytest.mark.parametrize("shape, tiles", [(SHAPES[0], 1), *((shape, 8) for shape in SHAPES)], ids=str)
def test_both_orders_have_float32s_accuracy(shape, tiles, monkeypatch):
    """With one tile a program, or several, some of which lie beyond the end."""
    monkeypatch.setattr(stem_gpu, "TILES", tiles)
    assert max(errors(first_blocks, *tensors(*shape))) < 2e-5              # 4e-7 seen in the interpreter, 6e-6 on an H200


def test_16_bits_cost_what_their_rounding_costs():
    x, parameters = tensors(dtype=torch.bfloat16)
    assert first_blocks(x, *parameters).dtype == torch.bfloat16
    rounded = lambda x, w, g, b: each(x.float(), w, g, b).bfloat16()       # of the output alone
    assert sum(errors(first_blocks, x, parameters)) < 3 * sum(errors(rounded, x, parameters))     # 1.7 seen: weights are rounded too


def test_moments_are_those_of_all_patches():
    x, _ = tensors()
    patches = torch.nn.functional.unfold(x.flatten(0, 1), 3, padding=1).unflatten(0, x.shape[:2]).transpose(2, 3).flatten(1, 2)
    patches = torch.cat([patches, torch.ones_like(patches[..., :1])], 2).double()               # (T, N H W, K + 1)
    torch.testing.assert_close(stem_gpu.moments(x, 3), patches.mT @ patches, rtol=1e-5, atol=1e-3)


def test_repeated_runs_agree_bit_for_bit():
    x, parameters = tensors()
    assert all(map(torch.equal, orders(first_blocks, x, parameters), orders(first_blocks, x, parameters)))


def test_the_same_task_has_the_same_numbers_in_every_batch():
    x, parameters = tensors()
    alone = [p[1:].detach().requires_grad_() for p in parameters]
    both = first_blocks(x, *parameters)
    assert torch.equal(first_blocks(x[1:], *alone)[0], both[1])


def test_a_constant_image_has_no_variance_and_stays_finite():
    x, parameters = tensors()
    y = first_blocks(torch.zeros_like(x), *parameters)
    assert all(g.isfinite().all() for g in (y, *torch.autograd.grad(y.sum(), parameters)))


def test_nan_is_not_hidden():
    x, parameters = tensors()
    x[0, 0, 0, 5, 5] = float("nan")
    assert first_blocks(x, *parameters)[0].isnan().any() and not first_blocks(x, *parameters)[1].isnan().any()


def test_only_images_without_a_gradient_are_taken():
    x, parameters = tensors()
    if DEVICE == "cuda":
        assert takes_first_block(x) and not takes_first_block(x.double()) and not takes_first_block(x.repeat(1, 1, 2, 1, 1))
    with pytest.raises(ValueError, match="need no gradient"):
        stem.first_blocks(x.requires_grad_(), *parameters)
