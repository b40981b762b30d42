"""Matrix products on a CPU by oneDNN, with their derivatives, where they are faster than MKL's.

PyTorch hands float32 products to MKL, which runs its code for AVX2 on AMD's CPUs. Zen 5 is the first of them whose arithmetic
is 512 bits wide: oneDNN, PyTorch's library for convolutions, multiplies up to twice as fast there (`python -m kernels.linears`
measures it). PyTorch has its product as an operation without derivatives, made for its compiler, and one for the gradient of
weights, which takes its operands as copies in oneDNN's own format; `linear` gives them derivatives of any order, which are
products again. Many small products at once, for Winograd's algorithm, are a convolution there (`grouped_product`).
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

LEAST = {2: 1_500_000, 3: 4_000_000}    # multiplications of a product, of one matrix or of each of several, for one thread:
                                        # below, the time to start it, and to put several side by side, is too long
LONG = 4096                             # rows from which on the operation for weights is faster, and those it gets at a time


@functools.cache
def is_zen5() -> bool:
    """Whether this is an AMD CPU of the first kind with these instructions, whose 512 bits oneDNN uses and MKL does not."""
    known = torch.cpu.get_capabilities()
    return known.get("cpu_name", "").startswith("AMD") and known.get("avx512_vp2intersect", False)


def has_onednn() -> bool:
    """Whether this build of PyTorch has oneDNN's product."""
    return hasattr(torch.ops.mkldnn, "_linear_pointwise")


def pays(a: Tensor, b: Tensor) -> bool:
    """Whether oneDNN's product of a ([T,] m, k) and b ([T,] n, k), transposed, is faster than MKL's here: by measurement."""
    if a.device.type != "cpu" or not a.dtype == b.dtype == torch.float32 or torch.compiler.is_compiling() or not is_zen5():
        return False
    threads = torch.get_num_threads()
    return (a.shape[-2] * b.shape[-2] * a.shape[-1] >= threads * LEAST[a.dim()]
            and (threads == 1 or a.is_contiguous() or _long(a, b))              # else a is copied first, by one thread
            and has_onednn()
            and not any(torch._C._functorch.is_batchedtensor(t) for t in (a, b)))


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a b^T + bias, without derivatives: a (m, k), b (n, k), bias (n) or None -> (m, n)."""
    return _by_onednn(a, b, bias) if pays(a, b) else F.linear(a, b, bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias with all derivatives: x ([T,] N, in); weight (out, in) and bias (out) or None, or for each task its
    own, (T, out, in) and (T, out) -> ([T,] N, out)."""
    if weight.dim() < x.dim():
        return linear(x.flatten(0, 1), weight, bias).unflatten(0, x.shape[:2])
    if pays(x, weight):
        return _Linear.apply(x, weight, bias)
    if weight.dim() == 2:
        return F.linear(x, weight, bias)
    return x @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)


def _long(a: Tensor, b: Tensor) -> bool:
    """Whether this is G^T x of many rows G and x."""
    return a.shape[-1] >= LONG and a.mT.is_contiguous() and b.mT.is_contiguous()


def _by_onednn(a: Tensor, b: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None and _long(a, b):
        parts = (torch.ops.aten.mkldnn_linear_backward_weights(G.to_mkldnn(), x.to_mkldnn(), x, False)[0].to_dense()
                 for G, x in zip(a.mT.split(LONG), b.mT.split(LONG)))
        return functools.reduce(Tensor.add_, parts)
    b = b if b.is_contiguous() or b.mT.is_contiguous() else b.contiguous()
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


def takes_grouped(x: Tensor, *channels: int) -> bool:
    """Whether `grouped_product` is faster than MKL's batched product here, for float32 x and so many channels."""
    return (x.dtype == torch.float32 and is_zen5() and not any(count % 16 for count in channels)
            and hasattr(torch.ops.mkldnn, "_reorder_convolution_weight"))


def grouped_product(matrices: Tensor, rows: int) -> Callable[[Tensor], Tensor]:
    """x -> x[:, g] matrices[g] for each g, without derivatives: matrices (G, k, n), x (rows, G, k) -> (rows, G, n), float32.

    It is oneDNN's 1 x 1 convolution of G groups, with weights that are packed once, here; PyTorch's own call packs them each
    time, which takes longer than to multiply.
    """
    groups, k, n = matrices.shape
    form = [0, 0], [1, 1], [1, 1], groups                                                          # padding, stride, dilation
    weight = matrices.mT.reshape(groups * n, k, 1, 1)
    weight = torch.ops.mkldnn._reorder_convolution_weight(weight, *form, [1, groups * k, rows, 1])

    def multiply(x: Tensor) -> Tensor:
        planes = x.view(1, rows, 1, groups * k).permute(0, 3, 1, 2)
        y = torch.ops.mkldnn._convolution_pointwise(planes, weight, None, *form, "none", [], "")
        return y.permute(0, 2, 3, 1).view(rows, groups, n)
    return multiply


class _Linear(Function):
    """(x, weight, bias) -> x weight^T + bias, of one matrix each or of T."""

    @staticmethod
    def forward(x, weight, bias):
        if x.dim() == 2:
            return _by_onednn(x, weight, bias)
        biases = [None] * len(x) if bias is None else bias
        return torch.stack([_by_onednn(*task) for task in zip(x, weight, biases)])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx, G):
        x, weight = ctx.saved_tensors
        return (linear(G, weight.mT) if used_now(ctx, 0) else None, linear(G.mT, x.mT) if used_now(ctx, 1) else None,
                G.sum(-2) if ctx.needs_input_grad[2] else None)


def used_now(ctx, k: int) -> bool:
    """Whether this very backward pass uses the gradient of input k. `needs_input_grad` is also true where only another pass
    will ask for it: an inner loop's gradients are those of some weights, the outer one's those of the activations too."""
    if not ctx.needs_input_grad[k]:
        return False
    try:
        return torch._C._will_engine_execute_node(ctx.next_functions[k][0])
    except RuntimeError:                     # it does not tell for leaves of the graph
        return True
