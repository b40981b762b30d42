"""Convolution after Winograd: against PyTorch's own, in both precisions and orders, and where it is taken."""

import pytest
import torch
import torch.nn.functional as F
from torch.nn.grad import conv2d_input, conv2d_weight

from kernels import conv2d, products, winograd

SIZES = [(9, 7), (8, 12), (3, 4), (1, 13), (5, 1), (30, 36), (29, 34)]     # whole tiles of 4 x 4, of 6 x 6, and parts of one


def last(*shape, generator=torch.Generator().manual_seed(0), **kind):
    return torch.randn(shape, generator=generator, **kind).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("method", [winograd.FOUR, winograd.SIX], ids=["4 outputs", "6 outputs"])
def test_two_products_more_than_outputs_of_three_taps(method):
    assert method.products == method.outputs + 2
    x, w = torch.randn(method.products, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    y = method.output.T @ ((method.filter @ w) * (method.input @ x))
    torch.testing.assert_close(y, x.unfold(0, 3, 1) @ w, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side, outputs", [(42, 6), (84, 6), (30, 6), (24, 4), (40, 4), (28, 4), (8, 4)])
def test_larger_tiles_where_they_save_products(side, outputs):
    assert winograd.suitable(torch.zeros(1, 1, side, side)).outputs == outputs


@pytest.mark.parametrize("channels", [(4, 6), (6, 4)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_convolution_and_gradients_of_any_size(size, channels):
    n_in, n_out = channels
    shapes = (3, n_in, *size), (n_out, n_in, 3, 3), (3, n_out, *size)
    x, weight, G = (last(*shape, dtype=torch.float64) for shape in shapes)
    for ours, own in ((winograd.convolve(x, weight), F.conv2d(x, weight, padding=1)),
                      (winograd.input_gradient(G, weight), conv2d_input(x.shape, weight, G, padding=1)),
                      (winograd.weight_gradient(G, x), conv2d_weight(x, weight.shape, G, padding=1))):
        torch.testing.assert_close(ours, own, rtol=1e-12, atol=1e-12)
    for planes in (winograd.convolve(x, weight), winograd.input_gradient(G, weight)):
        assert planes.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("rows", [1, 100])                                  # an image at a time, and several
@pytest.mark.parametrize("channels", [(16, 32), (48, 16)], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_convolution_tile_by_tile_through_onednn(size, channels, rows, monkeypatch):
    monkeypatch.setattr(products, "is_zen5", lambda: True)
    monkeypatch.setattr(winograd, "ROWS", rows)
    packed, product = [], winograd.grouped_product
    monkeypatch.setattr(winograd, "grouped_product", lambda *args: packed.append(args) or product(*args))
    n_in, n_out = channels
    x, weight, G = (last(*shape) for shape in ((3, n_in, *size), (n_out, n_in, 3, 3), (3, n_out, *size)))
    for ours, own in ((winograd.convolve(x, weight), F.conv2d(x.double(), weight.double(), padding=1)),
                      (winograd.input_gradient(G, weight), conv2d_input(x.shape, weight.double(), G.double(), padding=1))):
        assert (ours - own).norm() < 5e-6 * own.norm() and ours.is_contiguous(memory_format=torch.channels_last)
    assert len(packed) >= 2


@pytest.mark.parametrize("side, most", [(40, 2e-6), (42, 5e-6)], ids=["4 outputs", "6 outputs"])
def test_float32_stays_float32(side, most):
    x, weight, G = last(8, 64, side, side).relu(), last(64, 64, 3, 3), last(8, 64, side, side)
    exact = F.conv2d(x.double(), weight.double(), padding=1), conv2d_weight(x.double(), weight.shape, G.double(), padding=1)
    error = lambda found: [((a - b).norm() / b.norm()).item() for a, b in zip(found, exact)]
    ours = error((winograd.convolve(x, weight), winograd.weight_gradient(G, x)))
    assert max(ours) < most                    # 0.9e-6 to 1.3e-6 and 2.6e-6 to 3.1e-6 seen; PyTorch's own convolution has 3e-7


def three_orders(x, weight, bias):
    """The output, its gradient, and the gradients of a function of that gradient and of one of theirs."""
    inputs, y = [x, weight, bias], conv2d(x, weight, bias)
    of_y = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).pow(3).mean()
    found = [y, *torch.autograd.grad(of_y, inputs, create_graph=True)]
    for order in (2, 3):
        found += torch.autograd.grad(sum(g.pow(3).mean() for g in found[-3:]), inputs, create_graph=True)
    return found


def test_a_layer_is_the_same_in_all_orders_with_and_without(monkeypatch):
    inputs = [last(2, 4, 9, 7), last(6, 4, 3, 3), torch.randn(6)]
    run = lambda: three_orders(*(t.detach().requires_grad_() for t in inputs))
    for name in ("pays", "pays_for_weights"):
        monkeypatch.setattr(winograd, name, lambda *tensors: False)
    own, taken = run(), []
    for name in ("pays", "pays_for_weights"):
        monkeypatch.setattr(winograd, name, lambda *tensors, name=name: taken.append(name) or True)
    for a, b in zip(run(), own, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4 * b.abs().max().item())                # sums of float32 products
    assert taken.count("pays") > 3 and taken.count("pays_for_weights") > 1


@pytest.fixture
def avx2(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(winograd, "is_zen5", lambda: False)
    return monkeypatch


def planes(channels, side, images=8):
    return torch.zeros(images, channels, side, side).contiguous(memory_format=torch.channels_last)


def kernel(channels, k=3):
    return torch.zeros(channels, channels, k, k)


def both(x, w):
    return winograd.pays(x, w), winograd.pays_for_weights(planes(len(w), x.shape[2], len(x)), x, w)


def test_it_is_for_large_channels_last_float32_planes_on_avx2(avx2):
    large = planes(64, 42)
    assert both(large, kernel(64)) == both(planes(128, 21), kernel(128)) == (True, True)
    assert both(planes(64, 21), kernel(64)) == both(planes(32, 42), kernel(32)) == both(planes(64, 84), kernel(64)) == (False, True)
    for x, w in ((large.contiguous(), kernel(64)), (large.double(), kernel(64).double()), (large, kernel(64, 5)),
                 (large.bfloat16(), kernel(64).bfloat16()), (planes(64, 42, images=4), kernel(64)), (planes(64, 10), kernel(64)),
                 (planes(32, 24), kernel(32)), (planes(128, 16), kernel(128)), (planes(512, 8), kernel(512)),
                 (planes(256, 42), kernel(256)), (planes(3, 84), torch.zeros(64, 3, 3, 3))):
        assert both(x, w) == (False, False)
    avx2.setattr(torch, "get_num_threads", lambda: 2)
    assert both(large, kernel(64)) == (False, True) and both(planes(64, 21), kernel(64)) == (False, False)


def test_with_avx512_larger_planes_and_more_channels_are_taken_by_one_thread(avx2):
    avx2.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for channels, side in ((64, 42), (64, 84), (64, 28), (128, 21), (128, 112), (256, 28), (320, 21)):
        assert both(planes(channels, side), kernel(channels)) == (True, True)
    assert both(planes(64, 21), kernel(64)) == both(planes(32, 84), kernel(32)) == (False, True)
    for x, w in ((planes(640, 21), kernel(640)), (planes(256, 14), kernel(256)), (planes(32, 24), kernel(32))):
        assert both(x, w) == (False, False)
    avx2.setattr(torch, "get_num_threads", lambda: 2)
    assert both(planes(64, 42), kernel(64)) == (False, False)
    avx2.setattr(torch, "get_num_threads", lambda: 1)
    for module in (winograd, products):
        avx2.setattr(module, "is_zen5", lambda: True)
    for channels, side, expected in ((64, 42, (True, True)), (64, 84, (True, True)), (128, 42, (True, True)), (640, 28, (True, True)),
                                     (256, 21, (True, True)), (128, 21, (True, False)), (100, 42, (False, True)), (32, 84, (False, False)),
                                     (64, 28, (False, False)), (768, 28, (False, False))):
        assert both(planes(channels, side), kernel(channels)) == expected
    avx2.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert both(planes(64, 42), kernel(64)) == (False, False)


@pytest.mark.parametrize("in_dims", [(0, 0), (None, 0), (0, None)], ids=["both", "weights", "images"])
def test_vmap_goes_without(avx2, in_dims):
    x, weight = torch.randn(2, 8, 42, 42, 64).permute(0, 1, 4, 2, 3), torch.randn(2, 64, 64, 3, 3)
    assert winograd.pays(x[0], weight[0])
    pick = lambda k: [t[0 if dim is None else k] for t, dim in zip((x, weight), in_dims)]
    gradients = lambda x, weight: torch.func.grad(lambda x, weight: conv2d(x, weight).square().mean(), argnums=(0, 1))(x, weight)
    arguments = [t[0] if dim is None else t for t, dim in zip((x, weight), in_dims)]
    together = torch.vmap(conv2d, in_dims)(*arguments), *torch.vmap(gradients, in_dims)(*arguments)
    for k in range(2):
        for a, b in zip(together, (F.conv2d(*pick(k), padding=1), *gradients(*pick(k)))):
            torch.testing.assert_close(a[k], b, rtol=0, atol=5e-5 * b.abs().max().item())         # 1e-5 seen, of tiles of 6 x 6


def test_groups_go_without(avx2):
    x, weight = last(8, 128, 42, 42).requires_grad_(), last(128, 64, 3, 3).requires_grad_()
    assert winograd.pays(x, weight) and winograd.pays_for_weights(x, x, weight)
    run = lambda y: (y, *torch.autograd.grad(y.square().mean(), [x, weight]))
    for ours, own in zip(run(conv2d(x, weight, groups=2)), run(F.conv2d(x, weight, padding=1, groups=2)), strict=True):
        torch.testing.assert_close(ours, own, rtol=0, atol=5e-5 * own.abs().max().item())
