"""kernels/stem.py for GPUs: the first block of an image network of many tasks, in three Triton kernels that never store what the
convolution puts out.

Shapes: T tasks with N images each, C channels, C' filters of k x k, P = (H / 2) (W / 2) pooled pixels, K = C k k numbers of a
patch, KP the power of two above it. A patch has a one behind its K numbers, so that sums come with the products.

    moments     sum over a task's pixels of patch patch^T                                        (T, KP, KP)
    pooled      the largest of the four convolutions under a pooled pixel, ReLU, and its place    (T, N, h, w, C')
    gradients   sum over pooled pixels of D times the patch of the winner                         (T, C', KP)

Each is matrix products of a tile of pooled pixels: tensor cores, in three products of TF32 where float32 is asked for, which
leaves float32's accuracy. Sums are made in two stages without atomics, so that repeated runs agree bit for bit.
"""

import torch

from kernels.block_gpu import precision, tile_of
from kernels.modulate import launch, triton

if triton is not None:
    import triton.language as tl

    from kernels.block_gpu import dot

PIXELS = 32             # pooled pixels (moments: pixels) of a tile
FILTERS = 64            # of a tile, at most
TILES = 8               # that one program adds up in order
WARPS = 4


if triton is not None:

    @triton.jit
    def _patches(image, y, x, inside, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr,
                 KP: tl.constexpr, DOT: tl.constexpr):
        """(KP, pixels) around the pixels (y, x) of one image, zero beyond its edges, row K all ones."""
        K: tl.constexpr = C * SIZE * SIZE
        k = tl.arange(0, KP)
        at_y = y[None, :] + (k // SIZE % SIZE - SIZE // 2)[:, None]
        at_x = x[None, :] + (k % SIZE - SIZE // 2)[:, None]
        within = (at_y >= 0) & (at_y < H) & (at_x >= 0) & (at_x < W) & (k < K)[:, None] & inside[None, :]
        values = tl.load(image + (k // (SIZE * SIZE) * (H * W))[:, None] + at_y * W + at_x, within, 0.0)
        return tl.where((k == K)[:, None] & inside[None, :], 1.0, values.to(tl.float32)).to(DOT)

    @triton.jit
    def _moments_kernel(
        images,                          # read   (T, N, C, H, W)
        partial,                         # write  (T, programs, KP, KP)
        N, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, KP: tl.constexpr,
        PIXELS: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    ):
        PER_IMAGE: tl.constexpr = (H * W + PIXELS - 1) // PIXELS
        task = tl.program_id(1).to(tl.int64)
        total = tl.zeros((KP, KP), tl.float32)
        for step in range(TILES):
            tile = tl.program_id(0) * TILES + step
            pixel = tile % PER_IMAGE * PIXELS + tl.arange(0, PIXELS)
            inside = pixel < tl.where(tile < N * PER_IMAGE, H * W, 0)
            image = images + (task * N + tile // PER_IMAGE) * (C * H * W)
            values = _patches(image, pixel // W, pixel % W, inside, C, H, W, SIZE, KP, DOT)
            total += tl.dot(values, tl.trans(values), input_precision=PRECISION)
        k = tl.arange(0, KP)
        at = (task * tl.num_programs(0) + tl.program_id(0)) * (KP * KP) + k[:, None] * KP + k[None, :]
        tl.store(partial + at, total)

    @triton.jit
    def _pooled_kernel(
        images,                          # read   (T, N, C, H, W)
        weight,                          # read   (T, C', K)
        shift,                           # read   (T, C')
        out,                             # write  (T, N, h, w, C'); where GIVEN, read of `y`, the forward pass's
        winners,                         # write  (T, N, h, w, C'): 0 to 3, rows first; where GIVEN, read
        y,
        N, OUT: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, KP: tl.constexpr,
        PIXELS: tl.constexpr, FILTERS: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
        GIVEN: tl.constexpr,             # False: the largest, and ReLU; True: the one that won in y, 0 where y is
    ):
        K: tl.constexpr = C * SIZE * SIZE
        P: tl.constexpr = (H // 2) * (W // 2)
        task, image = tl.program_id(0) // N, tl.program_id(0).to(tl.int64)
        k, pixel = tl.arange(0, KP), tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
        c = tl.program_id(2) * FILTERS + tl.arange(0, FILTERS)
        inside = pixel < P
        images += image * (C * H * W)
        w = tl.load(weight + (task * OUT + c)[:, None] * K + k[None, :], (c < OUT)[:, None] & (k < K)[None, :], 0.0).to(DOT)
        b = tl.load(shift + task * OUT + c, c < OUT, 0.0).to(tl.float32)
        at = (image * P + pixel[None, :]) * OUT + c[:, None]
        stored = (c < OUT)[:, None] & inside[None, :]
        best = tl.zeros((FILTERS, PIXELS), tl.float32)
        winner = tl.zeros((FILTERS, PIXELS), tl.int8)
        if GIVEN:
            winner = tl.load(winners + at, stored, 0)
        for q in tl.static_range(4):
            values = _patches(images, pixel // (W // 2) * 2 + q // 2, pixel % (W // 2) * 2 + q % 2, inside, C, H, W, SIZE, KP, DOT)
            z = tl.dot(w, values, input_precision=PRECISION)
            if GIVEN:
                best = tl.where(winner == q, z, best)
            elif q == 0:
                best = z
            else:
                better = (z > best) | (z != z)
                best = tl.where(better, z, best)
                winner = tl.where(better, tl.full((FILTERS, PIXELS), q, tl.int8), winner)
        best += b[:, None]
        if GIVEN:
            best = tl.where(tl.load(y + at, stored, 0.0).to(tl.float32) > 0, best, 0.0)
        else:
            best = tl.where(best <= 0, 0.0, best)
            tl.store(winners + at, winner, stored)
        tl.store(out + at, best.to(out.dtype.element_ty), stored)

    @triton.jit
    def _gradients_kernel(
        images,                          # read   (T, N, C, H, W)
        D,                               # read   (T, N, h, w, C'): of the pooled numbers
        y,                               # read   the same
        winners,                         # read   the same
        partial,                         # write  (T, programs, C', KP)
        N, OUT: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SIZE: tl.constexpr, KP: tl.constexpr,
        PIXELS: tl.constexpr, FILTERS: tl.constexpr, TILES: tl.constexpr, PRECISION: tl.constexpr, DOT: tl.constexpr,
    ):
        P: tl.constexpr = (H // 2) * (W // 2)
        PER_IMAGE: tl.constexpr = (P + PIXELS - 1) // PIXELS
        task = tl.program_id(1).to(tl.int64)
        c = tl.program_id(2) * FILTERS + tl.arange(0, FILTERS)
        total = tl.zeros((FILTERS, KP), tl.float32)
        for step in range(TILES):
            tile = tl.program_id(0) * TILES + step
            n = tile // PER_IMAGE
            pixel = tile % PER_IMAGE * PIXELS + tl.arange(0, PIXELS)
            inside = pixel < tl.where(n < N, P, 0)
            read = (c < OUT)[:, None] & inside[None, :]
            at = ((task * N + n) * P + pixel[None, :]) * OUT + c[:, None]
            d = tl.load(D + at, read, 0.0).to(tl.float32)
            d = tl.where(tl.load(y + at, read, 0.0).to(tl.float32) > 0, d, 0.0)
            winner = tl.load(winners + at, read, 0)
            image = images + (task * N + n) * (C * H * W)
            for q in tl.static_range(4):
                values = _patches(image, pixel // (W // 2) * 2 + q // 2, pixel % (W // 2) * 2 + q % 2, inside, C, H, W, SIZE, KP, tl.float32)
                total = dot(tl.where(winner == q, d, 0.0), tl.trans(values), total, PRECISION, DOT)
        k = tl.arange(0, KP)
        at = ((task * tl.num_programs(0) + tl.program_id(0)) * OUT + c[:, None]) * KP + k[None, :]
        tl.store(partial + at, total, (c < OUT)[:, None])


def _sizes(images, k: int, over_pixels: bool = False) -> dict:
    """What all kernels take of images (T, N, C, H, W)."""
    tasks, count, channels, height, width = images.shape
    return {"N": count, "C": channels, "H": height, "W": width, "SIZE": k, "KP": max(16, triton.next_power_of_2(channels * k * k + 1)),
            "PIXELS": PIXELS, "num_warps": WARPS, **precision(images, over_pixels)}


def _programs(tiles: int) -> int:
    return triton.cdiv(tiles, TILES)


def moments(images, k: int):
    """Sums of products of the patches around all pixels: images (T, N, C, H, W) -> float64 (T, K + 1, K + 1), in the last row and
    column of which are sums and, at its end, the number of pixels."""
    sizes, tasks = _sizes(images, k), len(images)
    programs = _programs(sizes["N"] * triton.cdiv(sizes["H"] * sizes["W"], PIXELS))
    partial = torch.empty(tasks, programs, sizes["KP"], sizes["KP"], device=images.device)
    # Whatever the flags, in three products of TF32.
    launch(_moments_kernel, (programs, tasks), images, images, partial, TILES=TILES, **sizes | {"PRECISION": "tf32x3"})
    numbers = sizes["C"] * k * k + 1
    return partial.sum(1, dtype=torch.float64)[:, :numbers, :numbers]


def pooled(images, weight, shift):
    """relu(max_pool2d(conv2d(images, weight) + shift, 2)) of each task: images (T, N, C, H, W), weight (T, C', C, k, k), shift
    (T, C') -> y (T, N, H / 2, W / 2, C') and the places of the winners, int8."""
    y = images.new_empty(_output_shape(images, weight.shape[1]))
    winners = torch.empty_like(y, dtype=torch.int8)
    _launch_pooled(images, weight, shift, y, winners, y, False)
    return y, winners


def chosen(images, weight, shift, y, winners):
    """conv2d(images, weight) + shift where the winners are, 0 where y is; weight and shift as in `pooled`."""
    out = torch.empty_like(y)
    _launch_pooled(images, weight, shift, out, winners, y, True)
    return out


def gradients(images, D, y, winners, k: int):
    """Of `pooled`, given D of y: float32, to weight (T, C', C, k, k) and to shift (T, C')."""
    sizes, tasks, out = _sizes(images, k, over_pixels=True), len(y), y.shape[-1]
    programs = _programs(sizes["N"] * triton.cdiv(y.shape[2] * y.shape[3], PIXELS))
    partial = torch.empty(tasks, programs, out, sizes["KP"], device=images.device)
    filters = tile_of(out, FILTERS)
    launch(_gradients_kernel, (programs, tasks, triton.cdiv(out, filters)), images, images, D.contiguous(), y, winners, partial,
           OUT=out, FILTERS=filters, TILES=TILES, **sizes)
    total, numbers = partial.sum(1), sizes["C"] * k * k
    return total[:, :, :numbers].unflatten(2, (sizes["C"], k, k)), total[:, :, numbers]


def _output_shape(images, out: int) -> tuple:
    tasks, count, _, height, width = images.shape
    return tasks, count, height // 2, width // 2, out


def _launch_pooled(images, weight, shift, out, winners, y, given: bool) -> None:
    filters = tile_of(weight.shape[1], FILTERS)
    grid = images.shape[0] * images.shape[1], triton.cdiv(y.shape[2] * y.shape[3], PIXELS), triton.cdiv(weight.shape[1], filters)
    launch(_pooled_kernel, grid, images, images, weight.contiguous(), shift.contiguous(), out, winners, y, OUT=weight.shape[1],
           FILTERS=filters, GIVEN=given, **_sizes(images, weight.shape[-1]))
