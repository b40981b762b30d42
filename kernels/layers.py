"""Convolution and batch normalisation whose second derivatives cost little more than their first.

A meta-gradient differentiates a gradient. PyTorch writes that double backward out of elementary operations: batch norm's
takes about twenty passes over the activations, some of them against the memory layout, and a grouped convolution's
goes group by group. Both have closed forms, given here with one convolution or a few passes each. On a CPU this is most of
the cost of second-order MAML. All formulas hold for any memory layout; channels-last is kept where it comes in.

CONVOLUTION  y = x * w + b is linear in x and in w. With G = dL/dy and cotangents (U, V, c) of (dx, dw, db):

    to G = U * w + x * V + c         to x = dgrad(G, V)         to w = wgrad(G, U)

On CPUs with AVX2 or AVX-512 these are taken from kernels/winograd.py where that is faster.

BATCH NORM, per channel over n numbers:  xhat = (x - mean) r,  r = (var + eps)^(-1/2),  y = gamma xhat + beta.  With
P(A) = A - mean(A) - xhat mean(A xhat), which is symmetric:   dx = gamma r P(G),  dgamma = sum G xhat,  dbeta = sum G,
and for cotangents (U, p, q) of (dx, dgamma, dbeta), with K = n mean(U P(G)):

    to G = gamma r P(U) + p xhat + q                            to gamma = r K
    to x = r P(E) - gamma r^2 K xhat / n,     E = p G - gamma r / n (U sum G xhat + G sum U xhat)

Third derivatives, which the method never asks for, are left to PyTorch.
"""

import torch
import torch.nn.functional as F
from torch.autograd import Function

from kernels import winograd
from kernels.products import used_now


def conv2d(x, weight, bias=None, groups: int = 1, stride: int = 1):
    """Convolution of any odd size k, padded by k // 2: x (N, C, H, W), weight (C', C / groups, k, k), bias (C') or None ->
    (N, C', H, W), or the part of it that `stride` leaves."""
    thinned = stride > 1 and weight.shape[-1] == 1       # oneDNN writes out of bounds for few channels (its issue 6035)
    kept, stride = (x[..., ::stride, ::stride], 1) if thinned else (x, stride)
    if torch.compiler.is_compiling():        # the compiler does not take Functions inside torch.func; it has its own fusion
        return F.conv2d(kept, weight, bias, stride, weight.shape[-1] // 2, groups=groups)
    return _Conv.apply(_laid_out_as(x, kept) if thinned else x, weight, bias, groups, stride)


def batch_norm(x, gamma, beta, eps: float = 1e-5):
    """Normalise x (N, C, H, W) per channel with its own mean and variance, then scale by gamma and shift by beta, (C)."""
    if torch.compiler.is_compiling():
        return F.batch_norm(x, None, None, gamma, beta, training=True, eps=eps)
    return _BatchNorm.apply(x, gamma, beta, eps)[0]


def _channels_last(x) -> bool:
    if torch._C._functorch.is_batchedtensor(x):                                    # vmap knows one layout
        return False
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def per_channel(v):
    """(C) -> (C, 1, 1), beside planes (N, C, H, W); float32 beside 16-bit ones, which promotes the sums."""
    return v[:, None, None]


def _laid_out_as(x, G):
    """G in the memory format of x, contiguous, so that no kernel mixes two."""
    if torch._C._functorch.is_batchedtensor(G):
        return G
    return G.contiguous(memory_format=torch.channels_last if _channels_last(x) else torch.contiguous_format)


class _Conv(Function):
    """(x, weight, bias, groups, stride) -> y."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight, bias, groups, stride):
        if groups == stride == 1 and winograd.pays(x, weight):
            y = winograd.convolve(x, weight)
            return y if bias is None else y.add_(bias[:, None, None])
        return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, *ctx.form = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx, G):
        x, weight = ctx.saved_tensors
        wanted = [used_now(ctx, 0), *ctx.needs_input_grad[1:3]]
        return *_ConvBackward.apply(G, x, weight, *ctx.form, wanted), None, None


class _ConvBackward(Function):
    """(G, x, weight, groups, stride, which of three are wanted) -> dx, dweight, dbias."""

    generate_vmap_rule = True

    @staticmethod
    def forward(G, x, weight, groups, stride, wanted):
        G = _laid_out_as(x, G)
        dx = dweight = None
        if wanted[0] and groups == stride == 1 and winograd.pays(G, weight):
            dx = winograd.input_gradient(G, weight)
        if wanted[1] and groups == stride == 1 and winograd.pays_for_weights(G, x, weight):
            dweight = winograd.weight_gradient(G, x)
        rest = [wanted[0] and dx is None, wanted[1] and dweight is None, wanted[2]]
        if not any(rest):
            return dx, dweight, None
        pad = weight.shape[-1] // 2
        others = torch.ops.aten.convolution_backward(G, x, weight, [weight.shape[0]], [stride, stride], [pad, pad], [1, 1],
                                                     False, [0, 0], groups, rest)
        return others[0] if rest[0] else dx, others[1] if rest[1] else dweight, others[2]

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, groups, stride, _ = inputs
        ctx.form = groups, stride
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, U, V, c):
        G, x, weight = ctx.saved_tensors
        needs_G, needs_x, needs_weight = ctx.needs_input_grad[:3]
        to_G = to_x = to_weight = None
        if needs_G:
            to_G = None if U is None else _Conv.apply(U, weight, c, *ctx.form)
            if V is not None:
                rest = c if U is None else None
                other = _Conv.apply(x, V, rest, *ctx.form)
                to_G = other if to_G is None else to_G + other
            elif U is None and c is not None:
                to_G = c[:, None, None].expand_as(G)
        wanted = [needs_x and V is not None, needs_weight and U is not None, False]
        if any(wanted):                      # dgrad reads the weight's place only, wgrad the input's
            to_x, to_weight, _ = _ConvBackward.apply(G, x if U is None else U, weight if V is None else V, *ctx.form,
                                                     wanted)
        return to_G, to_x, to_weight, None, None, None


class _BatchNorm(Function):
    """(x, gamma, beta, eps) -> y, mean, r; the last two are for the backward pass only."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, gamma, beta, eps):
        if x.device.type != "cpu" or x.dtype != torch.float32 or not _channels_last(x):
            return torch.native_batch_norm(x, gamma, beta, None, None, True, 0.0, eps)
        mean, var = _channels_last_statistics(x)
        y = torch.native_batch_norm(x, gamma, beta, mean, var, False, 0.0, eps)[0]
        return y, mean, torch.rsqrt(var + eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, gamma, _, ctx.eps = inputs
        _, mean, r = output
        ctx.mark_non_differentiable(mean, r)
        ctx.save_for_backward(x, gamma, mean, r)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, G, *_):
        if G is None:
            return None, None, None, None
        return *_BatchNormBackward.apply(G, *ctx.saved_tensors, ctx.eps), None


class _BatchNormBackward(Function):
    """(G, x, gamma, mean, r, eps) -> dx, dgamma, dbeta. Mean and r are functions of x: their part is in `to x`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(G, x, gamma, mean, r, eps):
        return _norm_gradients(G, x, gamma, mean, r, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps = inputs
        _, dgamma, dbeta = output
        ctx.save_for_backward(*tensors, dgamma, dbeta)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, U, p, q):
        G, x, gamma, mean, r, sum_Gx, sum_G = ctx.saved_tensors
        if torch.is_grad_enabled():                   # a third derivative: mean, r and the sums are not constants
            (dx, dgamma, dbeta), pull_back = torch.func.vjp(lambda *args: _norm_formula(*args, ctx.eps), G, x, gamma)
            cotangents = (torch.zeros_like(d) if c is None else c for c, d in zip((U, p, q), (dx, dgamma, dbeta)))
            return *pull_back(tuple(cotangents)), None, None, None
        G = _laid_out_as(x, G)
        n = x.numel() // x.shape[1]
        zero = torch.zeros_like(sum_G)
        coefficient_G, slope, shift = (zero if p is None else r * p), zero, zero     # to x = .. G + slope x + shift + ..
        to_G = to_gamma = coefficient_U = None
        if U is not None:
            U = _laid_out_as(x, U)
            to_G, sum_Ux, sum_U = _norm_gradients(U, x, gamma, mean, r, ctx.eps)
            K = (U * G).sum((0, 2, 3), dtype=gamma.dtype) - (sum_U * sum_G + sum_Ux * sum_Gx) / n
            to_gamma = r * K
            scale = -gamma * r * r / n
            coefficient_U, coefficient_G = scale * sum_Gx, coefficient_G + scale * sum_Ux
            slope, shift = scale * r * K - coefficient_U * sum_Ux * r / n, -coefficient_U * sum_U / n
        slope = slope - coefficient_G * sum_Gx * r / n
        shift = shift - coefficient_G * sum_G / n - slope * mean
        to_x = torch.addcmul(per_channel(shift), x, per_channel(slope))
        to_x = torch.addcmul(to_x, G, per_channel(coefficient_G))
        if U is not None:
            to_x = torch.addcmul(to_x, U, per_channel(coefficient_U))
        if p is not None or q is not None:
            p, q = (zero if v is None else v for v in (p, q))
            direct = torch.addcmul(per_channel(q - p * r * mean), x, per_channel(p * r))
            to_G = (direct if to_G is None else to_G + direct).to(x.dtype)
        return to_G, to_x.to(x.dtype), to_gamma, None, None, None


def _channels_last_statistics(x):
    """Mean and variance per channel of a channels-last x on the CPU, in parts of some thousand numbers.

    PyTorch's own kernel adds all numbers of a channel up one by one in float32: over 75 images of 84 x 84 its variance was
    off by 2e-4, which the derivatives of a batch norm amplify; in parts it is off by less than 1e-6, at the same cost.
    """
    parts = x.split(max(1, 8192 // (x.shape[2] * x.shape[3])))                 # of so many images; the last may have fewer
    return combine_statistics([torch.ops.aten.batch_norm_update_stats(part, None, None, 0.0) for part in parts],
                              [len(part) for part in parts])


def combine_statistics(statistics, counts):
    """Mean and variance per channel, (C) each, of several parts together: [(mean, variance)], and how many images are in each."""
    if len(statistics) == 1:
        return statistics[0]
    means, vars_ = (torch.stack(values) for values in zip(*statistics))                                      # (parts, C)
    weight = torch.tensor(counts, dtype=means.dtype).unsqueeze(1) / sum(counts)
    mean = (weight * means).sum(0)
    return mean, (weight * (vars_ + (means - mean).square())).sum(0)


def _norm_gradients(G, x, gamma, mean, r, eps):
    return torch.ops.aten.native_batch_norm_backward(_laid_out_as(x, G), x, gamma, None, None, mean, r,
                                                     True, eps, [True, True, True])


def _norm_formula(G, x, gamma, eps):
    """dx, dgamma, dbeta in elementary operations, differentiable any number of times."""
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    r = torch.rsqrt(var + eps)
    xhat = (x - per_channel(mean)) * per_channel(r)
    dgamma, dbeta, n = (G * xhat).sum((0, 2, 3)), G.sum((0, 2, 3)), x.numel() // x.shape[1]
    projected = G - per_channel(dbeta / n) - xhat * per_channel(dgamma / n)
    return projected * per_channel(gamma * r), dgamma, dbeta
