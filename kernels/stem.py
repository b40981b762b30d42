"""The first block of an image network, conv, batch norm, max-pool 2, ReLU, with a batch norm that costs next to nothing.

Its input is images, which need no gradient and have few channels. With a patch p of C k k numbers around each of n pixels,
mean mu and covariance S over all of them, the convolution w (C', C k k) gives channels of mean w mu and variance w S w^T. So
batch norm's statistics are known before anything is convolved, from sums over the images alone, and it joins the convolution:

    scale = gamma (diag(w S w^T) + eps)^(-1/2)     y = relu(maxpool(x * (scale w) + beta - scale w mu))

The first block's activations are the largest of a network. Here no batch norm passes over them and none is kept: convolution,
pool and ReLU run over a few images at a time, in cache, and only the pooled numbers remain. y is piecewise linear in
W = scale w and c = beta - scale w mu. With the winners of the pool, D = dL/dy and cotangents (V, p) of (dW, dc):

    dW = wgrad(scatter(1[y > 0] D), x)      dc = sum 1[y > 0] D      to D = 1[y > 0] gather(x * V + p)

What batch norm adds to the derivatives comes from the C' C k k numbers of w, scale and mu, by autograd.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from kernels import block_gpu, stem_gpu
from kernels.products import product

MOST_CHANNELS = 4                # of the images; patches of more are no small matter
POOL = [2, 2], [2, 2], [0, 0], [1, 1], False         # window, stride, padding, dilation, no rounding up
CACHED = 2 ** 19                 # numbers of a convolution's output that are worked on at a time


def takes_first_block(x) -> bool:
    """Whether x (..., C, H, W) are images for which `first_block` pays, or `first_blocks` on a GPU, here and now."""
    if torch.compiler.is_compiling():                       # the compiler does not take Functions inside torch.func
        return False
    known = x.device.type == "cpu" or x.is_cuda and block_gpu.fits_kernels(x.dtype, x.device)
    return known and x.shape[-3] <= MOST_CHANNELS and not x.requires_grad


def first_block(images, weight, gamma, beta, eps: float = 1e-5):
    """relu(max_pool2d(batch_norm(conv2d(images, weight)), 2)), on a CPU, with exact first and second derivatives.

    images (N, C, H, W), which may not require a gradient, C up to 4; weight (C', C, k, k), k odd; gamma, beta (C').
    Returns (N, C', H/2, W/2), channels-last. The variance is a difference of second moments: images are to be centred,
    roughly, as the data loaders do (at a mean of 100 standard deviations three digits of it would be left). Raises ValueError
    for images that require a gradient.
    """
    if images.requires_grad:
        raise ValueError("first_block is for images that need no gradient: use conv2d and batch_norm")
    weight, shift = _with_norm(*patch_moments(images.detach(), weight.shape[-1]), weight, gamma, beta, eps)
    return _ConvPoolRelu.apply(images, weight.to(images.dtype), shift.to(images.dtype))[0]


def first_blocks(images, weight, gamma, beta, eps: float = 1e-5):
    """`first_block` of each of T tasks in a few launches on a GPU: images (T, N, C, H, W), float32 or bfloat16, weight
    (T, C', C, k, k), gamma and beta (T, C') -> (T, N, C', H/2, W/2), channels-last."""
    if images.requires_grad:
        raise ValueError("first_blocks is for images that need no gradient: use conv2d and batch_norm")
    images = images.contiguous()
    weight, shift = _with_norm(*_moments(stem_gpu.moments(images, weight.shape[-1])), weight, gamma, beta, eps)
    return _Pooled.apply(images, weight.to(images.dtype), shift.to(images.dtype))[0].movedim(-1, 2)


def _with_norm(mean, covariance, weight, gamma, beta, eps: float):
    """Weights and shifts of a convolution that batch norm has joined, float64: mean (..., K) and covariance (..., K, K) of the
    patches, weight (..., C', C, k, k), gamma and beta (..., C')."""
    flat = weight.flatten(-3).double()                                                               # (..., C', K)
    variance = ((flat @ covariance) * flat).sum(-1).clamp_min(0)
    scale = gamma * torch.rsqrt(variance + eps)
    shift = beta - scale * (flat @ mean.unsqueeze(-1)).squeeze(-1)
    return weight * scale[..., None, None, None], shift


def patch_moments(images, k: int):
    """Mean (C k k) and covariance (C k k, C k k) of the zero-padded k x k patches around all pixels of images (N, C, H, W).

    Both are float64; products are summed in float32 (or float64, if the images are) over one part of the images only.
    """
    images = images if images.dtype == torch.float64 else images.float()
    parts = (_patches(part, k) for part in images.split(_parts(2 * images[0].numel() * k * k)))
    products = sum(product(patches, patches).double() for patches in parts)
    return _moments(products)


def _moments(products):
    """Sums of products of patches with a one behind them (..., K + 1, K + 1) -> mean (..., K), covariance (..., K, K)."""
    products = products / products[..., -1:, -1:]                                        # by the number of pixels
    mean = products[..., -1, :-1]
    return mean, products[..., :-1, :-1] - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def _patches(x, k: int):
    """x (n, C, H, W) -> (C k k + 1, n H W): each pixel's patch, in the order of a convolution's weights, and a one below it.

    The ones give sums beside products, for less than nothing: MKL multiplies 28 rows faster than 27.
    """
    n, channels, height, width = x.shape
    padded = F.pad(x.contiguous(), [k // 2] * 4)
    by_image, by_channel, by_row, _ = padded.stride()
    views = padded.as_strided((channels, k, k, n, height, width), (by_channel, by_row, 1, by_image, by_row, 1))
    patches = x.new_empty(channels * k * k + 1, n * height * width)
    patches[:-1].view(views.shape).copy_(views)
    patches[-1] = 1
    return patches


def _last(x):
    return x.contiguous(memory_format=torch.channels_last)


def _planes(x, channels: int, shrink: int, dtype=None):
    """Room for x's convolution (1), or for the pooled one (2): (N, channels, H / shrink, W / shrink), channels-last."""
    size = len(x), channels, x.shape[2] // shrink, x.shape[3] // shrink
    return torch.empty(size, dtype=dtype or x.dtype, device=x.device, memory_format=torch.channels_last)


def _parts(numbers: int) -> int:
    """How many images to work on at a time, where one needs so many numbers."""
    return max(1, CACHED // numbers)


class _ConvPoolRelu(Function):
    """(x, weight, bias) -> y, and for the backward pass the winners' places in the planes (N, C', H/2, W/2)."""

    @staticmethod
    def forward(x, weight, bias):
        step = _parts(weight.shape[0] * x[0, 0].numel())
        y, winners = _planes(x, weight.shape[0], 2), _planes(x, weight.shape[0], 2, torch.int64)
        for part, out, places in zip(x.split(step), y.split(step), winners.split(step)):
            planes = F.conv2d(_last(part), weight, bias, padding=weight.shape[-1] // 2)
            torch.ops.aten.max_pool2d_with_indices.out(planes, *POOL, out=out, indices=places)
            out.relu_()
        return y, winners

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        y, winners = output
        ctx.save_for_backward(x, y, winners)
        ctx.weight_shape = weight.shape
        ctx.mark_non_differentiable(winners)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, D, _):
        if D is None:
            return None, None, None
        return None, *_ConvPoolReluBackward.apply(D, *ctx.saved_tensors, ctx.weight_shape)


class _ConvPoolReluBackward(Function):
    """(D, x, y, winners, shape of the weights) -> dW, dc. It is linear in D; y and winners are constants almost everywhere."""

    @staticmethod
    def forward(D, x, y, winners, shape):
        dtype = torch.promote_types(D.dtype, torch.float32)        # of the products: in bfloat16 few channels are slow
        step, sums = _parts(shape[0] * x[0, 0].numel()), 0
        for x, D_part, y, winners in zip(x.split(step), _last(D).split(step), y.split(step), winners.split(step)):
            D_part = torch.ops.aten.threshold_backward(D_part, y, 0).to(dtype)
            G = torch.ops.aten.max_pool2d_with_indices_backward(D_part, _planes(x, shape[0], 1, dtype), *POOL, winners)
            sums = sums + product(_patches(x.to(dtype), shape[-1]), G.permute(0, 2, 3, 1).flatten(0, 2).mT)
        sums = sums.to(D.dtype)
        return sums[:-1].mT.reshape(shape), sums[-1]

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, x, y, winners, _ = inputs
        ctx.save_for_backward(x, y, winners)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, V, p):
        x, y, winners = ctx.saved_tensors
        if V is None and p is None:
            return None, None, None, None, None
        V = x.new_zeros((y.shape[1], x.shape[1], 1, 1)) if V is None else V
        step, parts = _parts(y.shape[1] * x[0, 0].numel()), []
        for x, y, winners in zip(x.split(step), y.split(step), winners.split(step)):
            planes = F.conv2d(_last(x), V, p, padding=V.shape[-1] // 2).permute(0, 2, 3, 1)              # (n, H, W, C')
            places = winners.permute(0, 2, 3, 1)                                                         # (n, H/2, W/2, C')
            chosen = planes.flatten(1, 2).gather(1, places.flatten(1, 2)).unflatten(1, places.shape[1:3])
            parts.append(torch.ops.aten.threshold_backward(chosen.permute(0, 3, 1, 2), y, 0))
        return torch.cat(parts), None, None, None, None


class _Pooled(Function):
    """`stem_gpu.pooled`: (x, weight, shift) -> y, winners."""

    @staticmethod
    def forward(x, weight, shift):
        return stem_gpu.pooled(x, weight, shift)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        ctx.save_for_backward(x, *output)
        ctx.size = weight.shape[-1]
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, D, _):
        return (None, None, None) if D is None else (None, *_PooledBackward.apply(D, *ctx.saved_tensors, ctx.size))


class _PooledBackward(Function):
    """(D, x, y, winners, k) -> dW, dc, linear in D, as `_ConvPoolReluBackward`."""

    @staticmethod
    def forward(D, x, y, winners, k):
        return tuple(t.to(D.dtype) for t in stem_gpu.gradients(x, D, y, winners, k))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[1:4])
        ctx.weight_shape, ctx.shift_shape = (t.shape for t in output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, V, p):
        if V is None and p is None:
            return None, None, None, None, None
        x, y, winners = ctx.saved_tensors
        V, p = (x.new_zeros(shape) if t is None else t for t, shape in ((V, ctx.weight_shape), (p, ctx.shift_shape)))
        return stem_gpu.chosen(x, V.to(x.dtype), p.to(x.dtype), y, winners), None, None, None, None
