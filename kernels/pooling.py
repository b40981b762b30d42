"""Batch norm, max-pool 2 and ReLU after a convolution, on a CPU, with the pool first.

Per channel, batch norm is an increasing function of x, or where gamma < 0 a decreasing one. So its winners of the pool are known
before it: the largest x, or the smallest. Only they are normalised, a quarter of the numbers, and nothing as large as x is written
forward. Backward, only they have a gradient of their own; what the rest of x gets, for its part in mean and variance, is a number
of the channel times x plus another. The formulas, with second derivatives, are those of kernels/block_gpu.py.

The planes are gone through a few images at a time, in cache. Tensors are channels-last; of 16-bit activations all sums and
products are float32, and each result is rounded once.
"""

import torch
from torch.autograd import Function

from kernels.layers import _channels_last, _laid_out_as, _norm_formula, combine_statistics, per_channel
from kernels.stem import POOL

CACHED = 2 ** 19                 # numbers of x that a thread works on at a time
LEAST = 2 ** 17                  # of x: fewer are as fast one layer after the other
aten = torch.ops.aten


def takes_norm_pool(x) -> bool:
    """Whether `norm_pool` pays for x (N, C, H, W) here and now: on a CPU, channels-last, outside torch.compile and torch.func."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False                                               # neither vmap nor the compiler takes buffers
    return x.device.type == "cpu" and x.numel() >= LEAST and _channels_last(x)


def norm_pool(x, gamma, beta, relu: bool = True, eps: float = 1e-5):
    """max_pool2d(batch_norm(x), 2), and ReLU of it: x (N, C, H, W) on a CPU, gamma and beta (C) -> (N, C, H/2, W/2),
    channels-last. Derivatives of the first three orders are exact, the first two fast."""
    return _NormPool.apply(x.contiguous(memory_format=torch.channels_last), gamma, beta, relu, eps)[0]


class _NormPool(Function):
    """(x, gamma, beta, relu, eps) -> y, and for the backward pass the winners z of the pool (N, C, H/2, W/2), as they are in x,
    their places in the planes, and x's mean and r = (var + eps)^(-1/2)."""

    @staticmethod
    def forward(x, gamma, beta, relu, eps):
        wide = _wide(x.dtype)
        z, places = _halved(x, wide), _halved(x, torch.int64)
        sign = torch.where(gamma < 0, -1.0, 1.0).to(wide) if (gamma < 0).any() else None
        statistics, counts = [], []
        for part, part_z, part_places in _parts(x, z, places):
            part = part.to(wide)
            statistics.append(aten.batch_norm_update_stats(part, None, None, 0.0))
            counts.append(len(part))
            part = part if sign is None else part * per_channel(sign)
            aten.max_pool2d_with_indices.out(part, *POOL, out=part_z, indices=part_places)
        mean, var = combine_statistics(statistics, counts)
        r = torch.rsqrt(var + eps)
        if sign is not None:
            z.mul_(per_channel(sign))
        scale = gamma * r
        y = torch.addcmul(per_channel(beta - mean * scale), z, per_channel(scale))
        return (y.relu_() if relu else y).to(x.dtype), z, places, mean, r

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, gamma, _, *ctx.form = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, gamma, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, D, *_):
        if D is None:
            return None, None, None, None, None
        return *_NormPoolBackward.apply(D, *ctx.saved_tensors, *ctx.form), None, None


class _NormPoolBackward(Function):
    """(D, x, gamma, y, z, places, mean, r, relu, eps) -> dx, dgamma, dbeta. Mean and r are functions of x: their part is in `to x`;
    places, and where y > 0, are constants almost everywhere."""

    @staticmethod
    def forward(D, x, gamma, y, z, places, mean, r, relu, eps):
        D = _through_relu(D, y, relu)
        dgamma, dbeta = _sums(D, z, gamma, mean, r)
        n, a = x.numel() // x.shape[1], gamma * r
        slope = -a * r * dgamma / n
        return _spread(a, D, places, -a * dbeta / n - slope * mean, (slope, x)), dgamma, dbeta

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.relu, ctx.eps = inputs
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, U, p, q):
        D, x, gamma, y, z, places, mean, r, sum_Gx, sum_G = ctx.saved_tensors
        rest = (None,) * 7
        if torch.is_grad_enabled():                   # a third derivative: mean, r and the sums are not constants
            first, pull_back = torch.func.vjp(lambda *args: _formula(*args, y, places, ctx.relu, ctx.eps), D, x, gamma)
            return *pull_back(tuple(torch.zeros_like(d) if c is None else c for c, d in zip((U, p, q), first))), *rest
        D, n, a = _through_relu(D, y, ctx.relu), x.numel() // x.shape[1], gamma * r
        p, q = (torch.zeros_like(gamma) if v is None else v for v in (p, q))
        if U is None:
            sum_U = sum_Ux = K = torch.zeros_like(gamma)
            to_D = 0
        else:
            U, chosen = _laid_out_as(x, U), torch.empty_like(z)                                         # U at the winners
            sum_Ux, sum_U = _chosen_and_sums(U, x, places, gamma, mean, r, chosen)
            K = (chosen * D).sum((0, 2, 3)) - (sum_U * sum_G + sum_Ux * sum_Gx) / n
            to_D = chosen.mul_(per_channel(a))
        e, f = p - a * sum_Ux / n, -a * sum_Gx / n
        to_D = to_D + torch.addcmul(per_channel(q - a * sum_U / n - e * r * mean), z, per_channel(e * r))
        slope = -r * r * (e * sum_Gx + f * sum_Ux + gamma * r * K) / n
        shift = -r * (e * sum_G + f * sum_U) / n - slope * mean
        terms = [(slope, x)] if U is None else [(slope, x), (r * f, U)]
        return _through_relu(to_D.to(y.dtype), y, ctx.relu).to(y.dtype), _spread(r * e, D, places, shift, *terms), r * K, *rest


def _spread(scale, D, places, shift, *terms):
    """`scale` D at the winners' places, 0 elsewhere, plus `shift`, plus a number of each channel times a plane like x for each of
    `terms`, (number (C), plane (N, C, H, W)); the result is like the first of the planes."""
    D, planes = D * per_channel(scale), [plane for _, plane in terms]
    result = torch.empty_like(planes[0])
    for out, part_D, part_places, *parts in _parts(result, D, places, *planes):
        parts = [part.to(D.dtype) for part in parts]
        wide = out if out.dtype == D.dtype else torch.empty_like(out, dtype=D.dtype)
        aten.max_pool2d_with_indices_backward.grad_input(part_D, parts[0], *POOL, part_places, grad_input=wide)
        for (number, _), part in zip(terms, parts):
            wide.addcmul_(part, per_channel(number))
        wide.add_(per_channel(shift))
        if wide is not out:
            out.copy_(wide)
    return result


def _chosen_and_sums(U, x, places, gamma, mean, r, chosen):
    """U at the winners, written to `chosen`; sum U xhat and sum U over all, (C) each."""
    sums, rows = 0, lambda t: t.permute(0, 2, 3, 1).flatten(1, 2)                                      # (N, H W, C), a view
    for part_U, part_x, part_places, out in _parts(U, x, places, chosen):
        part_U = part_U.to(chosen.dtype)
        sums = sums + torch.stack(_sums(part_U, part_x.to(chosen.dtype), gamma, mean, r))
        torch.gather(rows(part_U), 1, rows(part_places), out=rows(out))
    return sums


def _sums(G, x, gamma, mean, r):
    """sum G xhat and sum G of each channel, for G and x (N, C, H, W): (C) each."""
    return aten.native_batch_norm_backward(G, x, gamma, None, None, mean, r, True, 0.0, [False, True, True])[1:]


def _through_relu(D, y, relu: bool):
    """D where y > 0, channels-last, in the numbers of sums."""
    D = _laid_out_as(y, D)
    return (aten.threshold_backward(D, y, 0) if relu else D).to(_wide(D.dtype))


def _formula(D, x, gamma, y, places, relu: bool, eps):
    """dx, dgamma, dbeta in elementary operations, differentiable any number of times."""
    D = D * (y > 0) if relu else D
    G = torch.zeros_like(x).flatten(2).scatter(2, places.flatten(2), D.flatten(2)).view_as(x)
    return _norm_formula(G, x, gamma, eps)


def _parts(*tensors):
    """Slices of all tensors over the same few images; the first is as large as x."""
    images = max(1, CACHED * torch.get_num_threads() // tensors[0][0].numel())
    return [tensors] if len(tensors[0]) <= images else zip(*(t.split(images) for t in tensors))


def _halved(x, dtype):
    n, channels, height, width = x.shape
    return torch.empty((n, channels, height // 2, width // 2), dtype=dtype, memory_format=torch.channels_last)


def _wide(dtype):
    return torch.promote_types(dtype, torch.float32)
