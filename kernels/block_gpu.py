"""The further blocks of Conv-4 for many tasks on a GPU: convolution, batch norm, max-pool 2, ReLU, in few launches for all tasks.

Shapes: x (T, N, H, W, C), T tasks with N images each, channels last; weight (C', C, k, k), shared by all tasks, or
(T, C', C, k, k); gamma, beta (T, C'); pooled planes (T, N, h, w, C') with h = H / 2, w = W / 2, rounded down.

CONVOLUTION  as the matrix product of shifted pixels and taps; its gradients too, G being that of the output:

    y = x * w                  to x = G * w, turned round and transposed                  to w = sum over pixels of G x^T

REST, with n = N H W, xhat = (x - mean) r, r = (var + eps)^(-1/2), and D the gradient of the pooled y:

    y  = relu(maxpool(gamma xhat + beta))              G = D where y > 0, at the winners of the pool, 0 elsewhere
    dx = gamma r (G - sum G / n - xhat sum G xhat / n)         dgamma = sum G xhat           dbeta = sum G

and for cotangents (U, p, q) of these, with a = gamma r, e = p - a sum U xhat / n, f = -a sum G xhat / n, K = sum U G -
(sum U sum G + sum U xhat sum G xhat) / n:

    to D = a U + e xhat + q - a sum U / n, at winners where y > 0            to gamma = r K
    to x = r (e G + f U - (e sum G + f sum U) / n - xhat ((e sum G xhat + f sum U xhat) / n + gamma r K / n))

which is the double backward of kernels/layers.py with the pool and the ReLU in it. The convolution leaves the sums that mean and
var come from. All sums are made in two stages without atomics: repeated runs agree bit for bit. float32 takes tensor cores by
three products of TF32 or six of bfloat16, which leaves float32's accuracy; with --precision tf32 it is one or three.
"""

import functools
import math

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from kernels.modulate import launch, triton
from kernels.products import used_now

if triton is not None:
    import triton.language as tl

ROWS = 64               # pixels of a tile of the convolution
DEPTH = 32              # channels of a step of it
FILTERS = 64            # filters of a tile, at most
SPLIT = 512             # pixels, at least, over which one program sums a gradient of the weights
PIXELS = 32             # of a tile of the rest
CHANNELS = 64           # of a tile of the rest, at most


if triton is not None:

    @triton.jit
    def dot(a, b, total, PRECISION: tl.constexpr, DOT: tl.constexpr):
        """total + a b. "bf16x3" and "bf16x6" are products of two or three parts of 8 bits each: more exact than TF32, and as exact
        as float32; unlike TF32's they need not lie in memory along the sum, as pixels do not."""
        if PRECISION == "bf16x3" or PRECISION == "bf16x6":
            a1, b1 = a.to(tl.bfloat16), b.to(tl.bfloat16)
            a, b = a - a1.to(tl.float32), b - b1.to(tl.float32)
            a2, b2 = a.to(tl.bfloat16), b.to(tl.bfloat16)
            if PRECISION == "bf16x6":
                a3, b3 = (a - a2.to(tl.float32)).to(tl.bfloat16), (b - b2.to(tl.float32)).to(tl.bfloat16)
                total = tl.dot(a3, b1, total)
                total = tl.dot(a1, b3, total)
                total = tl.dot(a2, b2, total)
            total = tl.dot(a2, b1, total)
            total = tl.dot(a1, b2, total)
            return tl.dot(a1, b1, total)
        return tl.dot(a.to(DOT), b.to(DOT), total, input_precision=PRECISION)

    @triton.jit
    def _conv_kernel(
        x,                               # read   (T, N, H, W, C)
        weight,                          # read   (T or 1, k k, C', C)
        y,                               # write  (T, N, H, W, C')
        partial,                         # write  (T, programs, 2, C'): sums of y and of its squares, where STATS
        N, C: tl.constexpr, OUT: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr,
        FLIP: tl.constexpr,              # the filter turned round
        SHARED: tl.constexpr, STATS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, FILTERS: tl.constexpr,
        PRECISION: tl.constexpr, DOT: tl.constexpr,
    ):
        STEPS: tl.constexpr = (C + DEPTH - 1) // DEPTH
        task = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        c = tl.program_id(2) * FILTERS + tl.arange(0, FILTERS)
        x += task * N * (H * W * C)
        y += task * N * (H * W * OUT)
        if not SHARED:
            weight += task * (SIZE * SIZE * OUT * C)
        at_y, at_x = row // W % H, row % W
        total = tl.zeros((ROWS, FILTERS), tl.float32)
        for step in range(SIZE * SIZE * STEPS):
            tap = step // STEPS
            k = step % STEPS * DEPTH + tl.arange(0, DEPTH)
            dy, dx = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
            if FLIP:
                dy, dx = -dy, -dx
            inside = (row < N * (H * W)) & (at_y + dy >= 0) & (at_y + dy < H) & (at_x + dx >= 0) & (at_x + dx < W)
            values = tl.load(x + (row + dy * W + dx)[:, None] * C + k[None, :], inside[:, None] & (k < C)[None, :], 0.0)
            w = tl.load(weight + (tap * OUT + c[None, :]) * C + k[:, None], (k < C)[:, None] & (c < OUT)[None, :], 0.0)
            total = dot(values, w, total, PRECISION, DOT)
        stored = (row < N * (H * W))[:, None] & (c < OUT)[None, :]
        tl.store(y + row[:, None] * OUT + c[None, :], total.to(y.dtype.element_ty), stored)
        if STATS:
            partial += (task * tl.num_programs(0) + tl.program_id(0)) * (2 * OUT)
            tl.store(partial + c, tl.sum(total, 0), c < OUT)
            tl.store(partial + OUT + c, tl.sum(total * total, 0), c < OUT)

    @triton.jit
    def _weight_gradient_kernel(
        x,                               # read   (T, N, H, W, C)
        G,                               # read   (T, N, H, W, C')
        partial,                         # write  (programs, T, k k, C', C)
        N, C: tl.constexpr, OUT: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr,
        SPLIT: tl.constexpr, DEPTH: tl.constexpr, FILTERS: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    ):
        BLOCKS: tl.constexpr = (C + FILTERS - 1) // FILTERS
        TAPS: tl.constexpr = SIZE * SIZE
        task, tap = (tl.program_id(1) // TAPS).to(tl.int64), tl.program_id(1) % TAPS
        k = tl.program_id(2) % BLOCKS * FILTERS + tl.arange(0, FILTERS)
        c = tl.program_id(2) // BLOCKS * FILTERS + tl.arange(0, FILTERS)
        x += task * N * (H * W * C)
        G += task * N * (H * W * OUT)
        dy, dx = tap // SIZE - SIZE // 2, tap % SIZE - SIZE // 2
        total = tl.zeros((FILTERS, FILTERS), tl.float32)
        for step in range(SPLIT // DEPTH):
            row = tl.program_id(0) * SPLIT + step * DEPTH + tl.arange(0, DEPTH)
            at_y, at_x = row // W % H + dy, row % W + dx
            inside = (row < N * (H * W)) & (at_y >= 0) & (at_y < H) & (at_x >= 0) & (at_x < W)
            g = tl.load(G + row[None, :] * OUT + c[:, None], inside[None, :] & (c < OUT)[:, None], 0.0)
            values = tl.load(x + (row + dy * W + dx)[:, None] * C + k[None, :], inside[:, None] & (k < C)[None, :], 0.0)
            total = dot(g, values, total, PRECISION, DOT)
        at = ((tl.program_id(0) * (tl.num_programs(1) // TAPS) + task) * TAPS + tap) * OUT + c[:, None]
        tl.store(partial + at * C + k[None, :], total, (c < OUT)[:, None] & (k < C)[None, :])

    @triton.jit
    def _total_kernel(
        partial,                         # read   (T, programs, SUMS, C)
        totals,                          # write  (T, SUMS, C): the sums, or mean and r where STATS
        programs, numbers, eps, C: tl.constexpr, SUMS: tl.constexpr, STATS: tl.constexpr,
        ROUNDS: tl.constexpr, PARTS: tl.constexpr, CHANNELS: tl.constexpr,
    ):
        task = tl.program_id(0).to(tl.int64)
        c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
        mean = tl.zeros((CHANNELS,), tl.float64)
        for s in tl.static_range(SUMS):
            total = tl.zeros((CHANNELS,), tl.float64)
            for step in range(ROUNDS):
                part = step * PARTS + tl.arange(0, PARTS)
                at = ((task * programs + part)[:, None] * SUMS + s) * C + c[None, :]
                total += tl.sum(tl.load(partial + at, (part < programs)[:, None] & (c < C)[None, :], 0.0).to(tl.float64), 0)
            if STATS:
                total = total / numbers
                if s == 0:
                    mean = total
                else:
                    variance = total - mean * mean
                    total = 1 / tl.sqrt(tl.where(variance < 0, 0.0, variance) + eps)
            tl.store(totals + (task * SUMS + s) * C + c, total.to(tl.float32), c < C)

    @triton.jit
    def _vector(pointer, task, which: tl.constexpr, SUMS: tl.constexpr, c, C: tl.constexpr):
        """Channels c of one of the vectors (T, SUMS, C), as a row."""
        return tl.load(pointer + (task * SUMS + which) * C + c, c < C, 0.0).to(tl.float32)[None, :]

    @triton.jit
    def _g_and_xhat(x, D, y, winners, stats, task, row, c, stored, N, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr):
        """G and xhat of the pixels `row` of a task and the channels c; where they lie in (T, N, H, W, C); and r."""
        at_y, at_x = row // W % H, row % W
        pooled = (task * N + row // (H * W)) * ((H // 2) * (W // 2)) + at_y // 2 * (W // 2) + at_x // 2
        at = pooled[:, None] * C + c[None, :]
        in_pool = stored & ((at_y < H // 2 * 2) & (at_x < W // 2 * 2))[:, None]
        won = tl.load(winners + at, in_pool, 0) == (at_y % 2 * 2 + at_x % 2)[:, None]
        opened = won & (tl.load(y + at, in_pool, 0.0).to(tl.float32) > 0)
        g = tl.where(opened, tl.load(D + at, in_pool, 0.0).to(tl.float32), 0.0)
        at = (task * N * (H * W) + row[:, None]) * C + c[None, :]
        r = _vector(stats, task, 1, 2, c, C)
        return g, (tl.load(x + at, stored, 0.0).to(tl.float32) - _vector(stats, task, 0, 2, c, C)) * r, at, r

    @triton.jit
    def _pool_kernel(
        x,                               # read   (T, N, H, W, C)
        stats,                           # read   (T, 2, C)
        gamma,                           # read   (T, C)
        beta,                            # read   (T, C)
        y,                               # write  (T, N, h, w, C)
        winners,                         # write  the same: 0 to 3, rows first
        winning,                         # write  the same: x of the winners
        N, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):
        HALF: tl.constexpr = W // 2
        P: tl.constexpr = (H // 2) * HALF
        task = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        stored = (row < N * P)[:, None] & (c < C)[None, :]
        first = (row // P * H + row % P // HALF * 2) * W + row % HALF * 2
        mean, scale = _vector(stats, task, 0, 2, c, C), _vector(stats, task, 1, 2, c, C) * _vector(gamma, task, 0, 1, c, C)
        shift = _vector(beta, task, 0, 1, c, C)
        x += task * N * (H * W * C)
        best = tl.zeros((PIXELS, CHANNELS), tl.float32)
        won = tl.zeros((PIXELS, CHANNELS), tl.float32)
        winner = tl.zeros((PIXELS, CHANNELS), tl.int8)
        for q in tl.static_range(4):
            value = tl.load(x + (first + (q // 2 * W + q % 2))[:, None] * C + c[None, :], stored, 0.0).to(tl.float32)
            z = (value - mean) * scale + shift
            if q == 0:
                best = z
                won = value
            else:
                better = (z > best) | (z != z)
                best = tl.where(better, z, best)
                won = tl.where(better, value, won)
                winner = tl.where(better, tl.full((PIXELS, CHANNELS), q, tl.int8), winner)
        at = (task * N * P + row[:, None]) * C + c[None, :]
        tl.store(y + at, tl.where(best <= 0, 0.0, best).to(y.dtype.element_ty), stored)
        tl.store(winning + at, won.to(winning.dtype.element_ty), stored)
        tl.store(winners + at, winner, stored)

    @triton.jit
    def _gradient_sums_kernel(
        D, y, winning,                   # read   (T, N, h, w, C)
        stats,                           # read   (T, 2, C)
        partial,                         # write  (T, programs, 2, C): sums of G and of G xhat
        N, C: tl.constexpr, P: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):
        task = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        stored = (row < N * P)[:, None] & (c < C)[None, :]
        at = (task * N * P + row[:, None]) * C + c[None, :]
        d = tl.load(D + at, stored, 0.0).to(tl.float32)
        d = tl.where(tl.load(y + at, stored, 0.0).to(tl.float32) > 0, d, 0.0)
        xhat = (tl.load(winning + at, stored, 0.0).to(tl.float32) - _vector(stats, task, 0, 2, c, C)) * _vector(stats, task, 1, 2, c, C)
        partial += (task * tl.num_programs(0) + tl.program_id(0)) * (2 * C)
        tl.store(partial + c, tl.sum(d, 0), c < C)
        tl.store(partial + C + c, tl.sum(d * xhat, 0), c < C)

    @triton.jit
    def _input_gradient_kernel(
        x,                               # read   (T, N, H, W, C)
        D, y, winners,                   # read   (T, N, h, w, C)
        stats,                           # read   (T, 2, C)
        gamma,                           # read   (T, C)
        sums,                            # read   (T, 2, C): of G and of G xhat
        dx,                              # write  (T, N, H, W, C)
        N, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):
        task = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        stored = (row < N * (H * W))[:, None] & (c < C)[None, :]
        g, xhat, at, r = _g_and_xhat(x, D, y, winners, stats, task, row, c, stored, N, C, H, W)
        numbers = N * (H * W)
        g = g - _vector(sums, task, 0, 2, c, C) / numbers - xhat * (_vector(sums, task, 1, 2, c, C) / numbers)
        tl.store(dx + at, (_vector(gamma, task, 0, 1, c, C) * r * g).to(dx.dtype.element_ty), stored)

    @triton.jit
    def _double_sums_kernel(
        U, x,                            # read   (T, N, H, W, C)
        D, y, winners,                   # read   (T, N, h, w, C)
        stats,                           # read   (T, 2, C)
        partial,                         # write  (T, programs, 3, C): sums of U, of U xhat and of U G
        N, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):
        task = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        stored = (row < N * (H * W))[:, None] & (c < C)[None, :]
        g, xhat, at, r = _g_and_xhat(x, D, y, winners, stats, task, row, c, stored, N, C, H, W)
        u = tl.load(U + at, stored, 0.0).to(tl.float32)
        partial += (task * tl.num_programs(0) + tl.program_id(0)) * (3 * C)
        tl.store(partial + c, tl.sum(u, 0), c < C)
        tl.store(partial + C + c, tl.sum(u * xhat, 0), c < C)
        tl.store(partial + 2 * C + c, tl.sum(u * g, 0), c < C)

    @triton.jit
    def _double_kernel(
        U, x,                            # read   (T, N, H, W, C)
        D, y, winners,                   # read   (T, N, h, w, C)
        stats,                           # read   (T, 2, C)
        gamma,                           # read   (T, C)
        p,                               # read   (T, C)
        sums,                            # read   (T, 2, C): of G and of G xhat
        more,                            # read   (T, 3, C): of U, of U xhat and of U G
        to_x,                            # write  (T, N, H, W, C)
        to_gamma,                        # write  (T, C)
        N, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):
        task = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        stored = (row < N * (H * W))[:, None] & (c < C)[None, :]
        g, xhat, at, r = _g_and_xhat(x, D, y, winners, stats, task, row, c, stored, N, C, H, W)
        u, numbers = tl.load(U + at, stored, 0.0).to(tl.float32), N * (H * W)
        sum_g, sum_gx = _vector(sums, task, 0, 2, c, C), _vector(sums, task, 1, 2, c, C)
        sum_u, sum_ux, sum_ug = _vector(more, task, 0, 3, c, C), _vector(more, task, 1, 3, c, C), _vector(more, task, 2, 3, c, C)
        a = _vector(gamma, task, 0, 1, c, C) * r
        e = _vector(p, task, 0, 1, c, C) - a * sum_ux / numbers
        f = -a * sum_gx / numbers
        K = sum_ug - (sum_u * sum_g + sum_ux * sum_gx) / numbers
        slope = (e * sum_gx + f * sum_ux + a * K) / numbers
        value = r * (e * g + f * u - (e * sum_g + f * sum_u) / numbers - xhat * slope)
        tl.store(to_x + at, value.to(to_x.dtype.element_ty), stored)
        if tl.program_id(0) == 0:
            tl.store(to_gamma + task * C + c[None, :], r * K, (c < C)[None, :])

    @triton.jit
    def _double_pooled_kernel(
        U,                               # read   (T, N, H, W, C)
        y, winners, winning,             # read   (T, N, h, w, C)
        stats,                           # read   (T, 2, C)
        gamma, p, q,                     # read   (T, C)
        more,                            # read   (T, 3, C): of U, of U xhat and of U G
        to_D,                            # write  (T, N, h, w, C)
        N, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
    ):
        HALF: tl.constexpr = W // 2
        P: tl.constexpr = (H // 2) * HALF
        task = tl.program_id(1).to(tl.int64)
        row = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
        c = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
        stored = (row < N * P)[:, None] & (c < C)[None, :]
        at = (task * N * P + row[:, None]) * C + c[None, :]
        winner = tl.load(winners + at, stored, 0).to(tl.int32)
        first = (row // P * H + row % P // HALF * 2) * W + row % HALF * 2
        place = first[:, None] + winner // 2 * W + winner % 2
        u = tl.load(U + (task * N * (H * W) + place) * C + c[None, :], stored, 0.0).to(tl.float32)
        r, numbers = _vector(stats, task, 1, 2, c, C), N * (H * W)
        xhat = (tl.load(winning + at, stored, 0.0).to(tl.float32) - _vector(stats, task, 0, 2, c, C)) * r
        a = _vector(gamma, task, 0, 1, c, C) * r
        e = _vector(p, task, 0, 1, c, C) - a * _vector(more, task, 1, 3, c, C) / numbers
        value = a * u + e * xhat + _vector(q, task, 0, 1, c, C) - a * _vector(more, task, 0, 3, c, C) / numbers
        value = tl.where(tl.load(y + at, stored, 0.0).to(tl.float32) > 0, value, 0.0)
        tl.store(to_D + at, value.to(to_D.dtype.element_ty), stored)


# --- launchers -------------------------------------------------------------------------------------------------------

def precision(x, over_pixels: bool = False, gpu: bool | None = None) -> dict:
    """How tiles of x are multiplied, in sums over channels or over pixels. `gpu`: as on one, if it is not clear from x."""
    gpu, fast = x.is_cuda if gpu is None else gpu, torch.backends.cudnn.allow_tf32
    half = x.dtype == torch.bfloat16 and gpu                     # the interpreter has no products of bfloat16
    if over_pixels and gpu and not half:
        return {"PRECISION": "bf16x3" if fast else "bf16x6", "DOT": tl.float32}
    return {"PRECISION": "tf32" if fast else "tf32x3", "DOT": tl.bfloat16 if half else tl.float32}


def tile_of(channels: int, most: int) -> int:
    """Channels of a tile: a power of two that tensor cores take."""
    return max(16, min(most, triton.next_power_of_2(channels)))


def _conv(x, packed, out: int, size: int, flip: bool, stats: bool):
    """packed: (T or 1, k k, out, C)."""
    tasks, count, height, width, channels = x.shape
    y, filters = x.new_empty(tasks, count, height, width, out), tile_of(out, FILTERS)
    programs = triton.cdiv(count * height * width, ROWS)
    partial = torch.empty(tasks, programs, 2, out, device=x.device) if stats else x.new_empty(0)
    launch(_conv_kernel, (programs, tasks, triton.cdiv(out, filters)), x, x, packed, y, partial, count, C=channels, OUT=out,
           H=height, W=width, SIZE=size, FLIP=flip, SHARED=len(packed) == 1, STATS=stats, ROWS=ROWS, DEPTH=DEPTH, FILTERS=filters,
           num_stages=3, **precision(x))
    return y, partial


def _by_tap(weight):
    """(C', C, k, k) or (T, C', C, k, k) -> (T or 1, k, k, C', C), a view."""
    return (weight if weight.dim() == 5 else weight.unsqueeze(0)).permute(0, 3, 4, 1, 2)


def convolve(x, weight, stats: bool = False):
    """x (T, N, H, W, C), weight as at the head -> y (T, N, H, W, C'), and (T, programs, 2, C') partial sums of it and of its
    squares for batch norm, empty unless asked for."""
    return _conv(x, _by_tap(weight).contiguous(), weight.shape[-4], weight.shape[-1], False, stats)


def input_gradient(G, weight):
    """G (T, N, H, W, C') -> to x (T, N, H, W, C)."""
    return _conv(G, _by_tap(weight).transpose(3, 4).contiguous(), weight.shape[-3], weight.shape[-1], True, False)[0]


def weight_gradient(G, x, size: int, shared: bool):
    """G (T, N, H, W, C'), x (T, N, H, W, C) -> float32 (C', C, k, k), the sum over all tasks, if shared, else (T, C', C, k, k)."""
    tasks, count, height, width, channels = x.shape
    out, pixels = G.shape[-1], count * height * width
    split = max(SPLIT, min(8 * SPLIT, triton.next_power_of_2(pixels // 32)))
    programs, filters = triton.cdiv(pixels, split), tile_of(max(channels, out), FILTERS)
    partial = torch.empty(programs, tasks, size, size, out, channels, device=x.device)
    blocks = triton.cdiv(channels, filters) * triton.cdiv(out, filters)
    launch(_weight_gradient_kernel, (programs, tasks * size * size, blocks), x, x, G, partial, count, C=channels, OUT=out,
           H=height, W=width, SIZE=size, SPLIT=split, DEPTH=DEPTH, FILTERS=filters, num_stages=3, **precision(x, over_pixels=True))
    return partial.sum((0, 1) if shared else 0).movedim((-4, -3), (-2, -1))


def _total(partial, numbers: int = 1, eps: float = 0.0, stats: bool = False):
    """(T, programs, SUMS, C) -> the sums, (T, SUMS, C), or mean and r."""
    tasks, programs, sums, channels = partial.shape
    totals, parts = torch.empty(tasks, sums, channels, device=partial.device), min(256, triton.next_power_of_2(programs))
    launch(_total_kernel, (tasks, triton.cdiv(channels, 16)), partial, partial, totals, programs, float(numbers), eps, C=channels,
           SUMS=sums, STATS=stats, ROUNDS=triton.cdiv(programs, parts), PARTS=parts, CHANNELS=16)
    return totals


def _launch(kernel, rows: int, x, *tensors, sums: int = 0, **sizes):
    """Start a kernel over tiles of `rows` rows of each task; return what it leaves in partial sums, added up."""
    tasks, count, height, width, channels = x.shape
    tile = tile_of(channels, CHANNELS)
    programs = triton.cdiv(rows, PIXELS)
    partial = torch.empty(tasks, programs, sums, channels, device=x.device) if sums else None
    sizes = sizes or {"H": height, "W": width}
    launch(kernel, (programs, tasks, triton.cdiv(channels, tile)), x, *tensors, *[partial] * (sums > 0), count, C=channels,
           PIXELS=PIXELS, CHANNELS=tile, **sizes)
    return _total(partial) if sums else None


def _rows(x) -> tuple[int, int]:
    """Pixels of a task, and those of its pooled planes."""
    _, count, height, width, _ = x.shape
    return count * height * width, count * (height // 2) * (width // 2)


# --- autograd --------------------------------------------------------------------------------------------------------

class _Conv(Function):
    """(x, weight, whether statistics are wanted) -> y, partial sums."""

    @staticmethod
    def forward(x, weight, stats):
        return convolve(x.contiguous(), weight, stats)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:2])
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, G, _):
        if G is None:
            return None, None, None
        return *_ConvBackward.apply(G, *ctx.saved_tensors, [used_now(ctx, 0), ctx.needs_input_grad[1]]), None


class _ConvBackward(Function):
    """(G, x, weight, which of two are wanted) -> dx, dweight."""

    @staticmethod
    def forward(G, x, weight, wanted):
        G = G.contiguous()
        dx = input_gradient(G, weight) if wanted[0] else None
        if not wanted[1]:
            return dx, None
        return dx, weight_gradient(G, x.contiguous(), weight.shape[-1], weight.dim() == 4).to(weight.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, U, V):
        G, x, weight = ctx.saved_tensors
        needs_G, needs_x, needs_weight, _ = ctx.needs_input_grad
        to_G = to_x = to_weight = None
        if needs_G:
            parts = [_Conv.apply(a, b, False)[0] for a, b in ((U, weight), (x, V)) if a is not None and b is not None]
            to_G = sum(parts[1:], parts[0]) if parts else None
        wanted = [needs_x and V is not None, needs_weight and U is not None]
        if any(wanted):                      # the one reads the weight's place only, the other the input's
            to_x, to_weight = _ConvBackward.apply(G, x if U is None else U, weight if V is None else V, wanted)
        return to_G, to_x, to_weight, None


class _NormPoolRelu(Function):
    """(x, partial sums of it, gamma, beta, eps) -> y, winners, what won, (mean, r); the last three are for the backward pass."""

    @staticmethod
    def forward(x, partial, gamma, beta, eps):
        pixels, pooled = _rows(x)
        stats = _total(partial, pixels, eps, stats=True)
        tasks, count, height, width, channels = x.shape
        y = x.new_empty(tasks, count, height // 2, width // 2, channels)
        winners, winning = torch.empty_like(y, dtype=torch.int8), torch.empty_like(y)
        _launch(_pool_kernel, pooled, x, x, stats, gamma.contiguous(), beta.contiguous(), y, winners, winning)
        return y, winners, winning, stats

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(inputs[0], inputs[2], *output)      # as they came: a copy would not lead back
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, D, *_):
        if D is None:
            return None, None, None, None, None
        dx, dgamma, dbeta = _NormPoolReluBackward.apply(D, *ctx.saved_tensors)
        return dx, None, dgamma, dbeta, None


class _NormPoolReluBackward(Function):
    """(D, x, gamma, y, winners, what won, stats) -> dx, dgamma, dbeta. What comes from x is in `to x`."""

    @staticmethod
    def forward(D, x, gamma, y, winners, winning, stats):
        (pixels, pooled), D = _rows(x), D.contiguous()
        sums = _launch(_gradient_sums_kernel, pooled, x, D, y, winning, stats, sums=2, P=y.shape[2] * y.shape[3])
        dx = torch.empty_like(x)
        _launch(_input_gradient_kernel, pixels, x, x, D, y, winners, stats, gamma.contiguous(), sums, dx)
        return dx, sums[:, 1], sums[:, 0]

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, *output[1:])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx, U, p, q):
        D, x, gamma, y, winners, winning, stats, sum_gx, sum_g = ctx.saved_tensors
        (pixels, pooled), D, gamma, sums = _rows(x), D.contiguous(), gamma.contiguous(), torch.stack([sum_g, sum_gx], 1)
        U = torch.zeros_like(x) if U is None else U.contiguous()
        p, q = (torch.zeros_like(gamma) if v is None else v.contiguous() for v in (p, q))
        more = _launch(_double_sums_kernel, pixels, x, U, x, D, y, winners, stats, sums=3)
        to_D, to_x, to_gamma = torch.empty_like(D), torch.empty_like(x), torch.empty_like(gamma)
        _launch(_double_kernel, pixels, x, U, x, D, y, winners, stats, gamma, p, sums, more, to_x, to_gamma)
        _launch(_double_pooled_kernel, pooled, x, U, y, winners, winning, stats, gamma, p, q, more, to_D)
        return to_D, to_x, to_gamma, None, None, None, None


# --- public ----------------------------------------------------------------------------------------------------------

def takes_blocks(x) -> bool:
    """Whether x (T, N, C, H, W) is what `task_blocks` is for, here and now."""
    fits = x.is_cuda and not torch.compiler.is_compiling() and fits_kernels(x.dtype, x.device)
    return fits and x.shape[2] >= 16 and math.prod(x.shape[1:]) < 2 ** 31             # places in a task are numbers of 32 bits


@functools.cache
def fits_kernels(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether these kernels run there: on tensor cores that know TF32 and bfloat16, those of Ampere (sm_80) and later."""
    known = triton is not None and dtype in (torch.float32, torch.bfloat16)
    return known and torch.cuda.get_device_capability(device) >= (8, 0)


def task_convolution(x, weight):
    """The convolution of `task_blocks` alone: x (T, N, H, W, C) -> (T, N, H, W, C')."""
    return _Conv.apply(x, weight, False)[0]


def task_blocks(x, weight, gamma, beta, eps: float = 1e-5):
    """relu(max_pool2d(batch_norm(conv2d(x, weight)), 2)) of each of T tasks, batch norm with the task's own statistics.

    x (T, N, C, H, W), fastest if channels-last, float32 or bfloat16; weight (C', C, k, k) or (T, C', C, k, k) of the same dtype, k
    odd; gamma, beta (T, C'), float32. Returns (T, N, C', H/2, W/2), channels-last. First and second derivatives.
    """
    y, partial = _Conv.apply(x.movedim(2, -1), weight, True)
    return _NormPoolRelu.apply(y, partial, gamma, beta, eps)[0].movedim(-1, 2)
