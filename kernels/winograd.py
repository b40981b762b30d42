"""3 x 3 convolutions on CPUs by Winograd's minimal filtering: matrix products with a fourth or a fifth of the multiplications.

m outputs of a filter with three taps, y_i = sum_t w_t x_(i + t), are y = output^T (filter w * input x), with m + 2 products
instead of 3 m: polynomials multiplied at m + 1 points and infinity. A plane is cut into tiles of m x m outputs with their
inputs; in both directions 6 x 6 outputs are 64 products instead of 324 (4 x 4 are 36 instead of 144, with a third of the
rounding error: for planes that are so covered with fewer), each a matrix product over channels and tiles:

    y = output^T [filter w filter^T * input x input^T] output         dL/dx: the same, of dL/dy and the filter turned round
    dL/dw = filter^T [sum over tiles of output dL/dy output^T * input x input^T] filter

Even transforms written in PyTorch are then faster for large planes, if the images go one by one through the same few buffers,
which stay in cache: with AVX2, where PyTorch's weight gradients are half as fast as its convolutions, with AVX-512, where both
are as fast as a matrix product, and on AMD's Zen 5, where both are more than twice as fast as one of MKL's, but not as one of
oneDNN's, which takes the products of `convolve` there. All tensors are channels-last, float32 (or float64, for tests).
"""

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.products import grouped_product, is_zen5, takes_grouped


class Filtering(NamedTuple):
    """Its three matrices, float64: m outputs by n = m + 2 products."""
    filter: Tensor          # (n, 3)
    input: Tensor           # (n, n)
    output: Tensor          # (n, m)

    @property
    def products(self) -> int:
        return self.output.shape[0]

    @property
    def outputs(self) -> int:
        return self.output.shape[1]

    def tiles(self, x) -> tuple[int, int]:
        """In a column and in a row of the planes x (N, C, H, W)."""
        return tuple(-(-size // self.outputs) for size in x.shape[2:])


def filtering(*points: float) -> Filtering:
    """The one that multiplies polynomials at these points and at infinity (Toom and Cook's, transposed)."""
    at = torch.tensor(points, dtype=torch.float64)
    infinity = lambda count: torch.eye(count, dtype=at.dtype)[-1:]                          # takes the highest coefficient
    values = lambda count: torch.cat([at[:, None] ** torch.arange(count), infinity(count)])
    scale = torch.cat([(at[:, None] - at + torch.eye(len(at))).prod(1), torch.ones(1)])[:, None]
    n = len(at) + 1
    return Filtering(values(3) / scale, torch.linalg.inv(values(n)).T * scale, values(n - 2))


FOUR, SIX = filtering(0, 1, -1, 1/2, -2), filtering(0, 1, -1, 1/2, -1/2, 2, -2)         # outputs; points of small errors


def suitable(x) -> Filtering:
    """SIX, where it covers the planes x (N, C, H, W) with clearly fewer products; of few tiles, they are slower ones."""
    products = lambda method: method.products ** 2 * math.prod(method.tiles(x))
    return SIX if products(SIX) < 0.85 * products(FOUR) and math.prod(SIX.tiles(x)) >= 25 else FOUR


class Limits(NamedTuple):
    """Where it is faster than PyTorch's own. `numbers` are those of a plane's tiles of 4 x 4 times channels: few do not pay, and
    many leave the cache."""
    most: int               # channels that were measured
    channels: int           # least for convolve, with one thread
    numbers: range
    channels_weights: int   # least for weight_gradient, which pays for less, as PyTorch's is slower than its convolutions
    numbers_weights: dict   # threads: least numbers


# Measured on EPYCs, by PyTorch's name of their instructions; all but Zen 5 with tiles of 4 x 4 alone. On Zen 5 `convolve` is 1.07
# times as fast as PyTorch's own with 64 channels, 1.3 with 128 and 1.8 with 512 (`python -m kernels.convolutions --layers conv2`).
LIMITS = {"AVX2": Limits(128, 64, range(2 ** 12, 2 ** 14 + 1), 32, {1: 2 ** 11, 2: 2 ** 12}),
          "AVX512": Limits(320, 64, range(3000, 2 ** 17), 32, {1: 2 ** 11}),
          "Zen 5": Limits(640, 64, range(4500, 2 ** 17), 64, {1: 7000})}


ROWS = 100              # tiles, about, of as many images as that takes, in one of oneDNN's products, which is slower with fewer


def pays(x, weight) -> bool:
    """Whether `convolve` is faster than PyTorch's own here, for x (N, C, H, W) and weight (C', C, k, k): by measurement."""
    limits = _limits(x, weight)
    if limits is LIMITS["Zen 5"] and not takes_grouped(x, *weight.shape[:2]):
        return False
    return (limits is not None and min(weight.shape[:2]) >= limits.channels and _numbers(x, weight) in limits.numbers
            and torch.get_num_threads() == 1)


def pays_for_weights(G, x, weight) -> bool:
    """Whether `weight_gradient` is, for G (N, C', H, W) too."""
    limits = _limits(x, weight, G)
    least = limits and limits.numbers_weights.get(torch.get_num_threads())
    return bool(least) and min(weight.shape[:2]) >= limits.channels_weights and _numbers(x, weight) >= least


def _limits(x, weight, *others) -> Limits | None:
    """Those of this CPU, if x (N, C, H, W) and weight (C', C, k, k) are of the kind that was measured; `others` enter the same
    products."""
    if x.device.type != "cpu" or any(torch._C._functorch.is_batchedtensor(t) for t in (x, weight, *others)):
        return None                                                                            # vmap takes no buffers
    if not (x.dtype == weight.dtype == torch.float32 and weight.shape[2:] == (3, 3) and len(x) >= 8 and min(x.shape[2:]) > 20
            and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)):
        return None
    instructions = torch.backends.cpu.get_cpu_capability()
    limits = LIMITS.get("Zen 5" if instructions == "AVX512" and is_zen5() else instructions)
    return limits if limits and max(weight.shape[:2]) <= limits.most else None


def _numbers(x, weight) -> int:
    return -(-x.shape[2] // 4) * -(-x.shape[3] // 4) * max(weight.shape[:2])


def convolve(x, weight):
    """x (N, C, H, W), weight (C', C, 3, 3) -> their convolution (N, C', H, W), zero-padded."""
    n, channels, out = len(x), x.shape[1], len(weight)
    tiles = _Tiles(x, out, by_tile=takes_grouped(x, channels, out))
    filters = torch.einsum("ph,qv,ocvh->pqco", tiles.filter, tiles.filter, weight).reshape(-1, channels, out)
    y = torch.empty((n, out, *x.shape[2:]), dtype=x.dtype, memory_format=torch.channels_last)
    images, places = x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)
    if not tiles.by_tile:
        for image, place in zip(images, places):
            tiles.transform_products(torch.bmm(tiles.transform_input(image), filters, out=tiles.products), place)
        return y
    together = max(1, ROWS // tiles.count)
    transformed = x.new_empty(together, *tiles.x_transformed.shape) if together > 1 else tiles.x_transformed.unsqueeze(0)
    product = functools.cache(lambda count: grouped_product(filters, count * tiles.count))             # the last part may be smaller
    for part, part_places in zip(images.split(together), places.split(together)):
        for image, numbers in zip(part, transformed):
            tiles.transform_input(image, numbers)
        products = product(len(part))(transformed[:len(part)].flatten(0, 1)).unflatten(0, (len(part), -1))
        for numbers, place in zip(products, part_places):
            tiles.transform_products(numbers, place)
    return y


def input_gradient(G, weight):
    """dL/dx (N, C, H, W) from G = dL/dy (N, C', H, W)."""
    return convolve(G, weight.flip(2, 3).transpose(0, 1))


def weight_gradient(G, x):
    """dL/dw (C', C, 3, 3) from G = dL/dy (N, C', H, W)."""
    tiles = _Tiles(x, G.shape[1])
    sums = x.new_zeros(tiles.n ** 2, x.shape[1], G.shape[1])
    for image, image_G in zip(x.permute(0, 2, 3, 1), G.permute(0, 2, 3, 1)):
        torch.baddbmm(sums, tiles.transform_input(image).mT, tiles.transform_gradient(image_G), out=sums)
    taps = torch.einsum("ph,qv->vhpq", tiles.filter, tiles.filter).reshape(9, -1)
    return (taps @ sums.flatten(1)).view(3, 3, x.shape[1], -1).permute(3, 2, 0, 1).contiguous()


class _Tiles:
    """The buffers for one image of x (N, C, H, W) and its output of `out` channels, and the transforms between them.

    A transform first takes the columns of the plane, in place: one matrix product for each row of tiles. A copy then puts the
    tiles side by side, so that their rows are one product too; or one after the other, `by_tile`, as oneDNN wants them, with a
    product for each. Of a tile's n x n numbers p counts along a row, q along a column. What a transform returns is a buffer, which
    the next call overwrites.
    """

    def __init__(self, x, out: int, by_tile: bool = False):
        channels, height, width = x.shape[1:]
        method = suitable(x)
        self.filter, self.input, self.output = (matrix.to(x) for matrix in method)
        n, m, (down, across) = method.products, method.outputs, method.tiles(x)
        self.n, self.m, self.down, self.count, numbers = n, m, down, down * across, n * n * down * across
        self.by_tile = by_tile
        a, b, c = (x.new_empty(numbers * max(channels, out)) for _ in range(3))
        take = lambda memory, *shape: memory[: math.prod(shape)].view(shape)

        plane = x.new_zeros(m * down + 2, m * across + 2, channels)
        row = plane.stride(0)
        self.x = plane[1:height + 1, 1:width + 1]
        self.x_columns = plane.as_strided((down, n, row), (m * row, row, 1))
        self.x_half = take(a, down, n, row)
        shape, strides = (n, n, down, across, channels), (channels, row, n * row, m * channels, 1)
        order = (2, 3, 0, 1, 4) if by_tile else (0, 1, 2, 3, 4)
        self.x_half_tiles = a.as_strided([shape[k] for k in order], [strides[k] for k in order])
        self.x_gathered = take(b, *self.x_half_tiles.shape)
        self.x_transformed = take(a, down * across, n * n, channels) if by_tile else take(a, n * n, down * across, channels)

        self.covered = (height, width) == (m * down, m * across)                     # by whole tiles: then no copy is needed
        self.y_plane = x.new_zeros(m * down, m * across, out)
        self.y, self.y_columns = self.y_plane[:height, :width], (down, m, m * across * out)
        self.products = take(b, n * n, down * across, out)
        self.y_tiles = (down, across, m, n, out) if by_tile else (m, n, down, across, out)
        self.y_gathered = take(c, *self.y_tiles)
        self.y_half, self.G_half = take(a, down, n, across, m, out), take(b, down, n, across, m, out)

    def transform_input(self, image, result=None):
        """image (H, W, C) -> (p q, tiles, C), or (tiles, p q, C) by tile; in `result`, if given."""
        result = self.x_transformed if result is None else result
        self.x.copy_(image)
        torch.bmm(self.input.expand(self.down, -1, -1), self.x_columns, out=self.x_half)
        self.x_gathered.copy_(self.x_half_tiles)
        self._along_rows(self.input, self.x_gathered, result)
        return result

    def transform_products(self, products, place):
        """`products` (p q, tiles, C'), or (tiles, p q, C') by tile -> the output, written to `place` (H, W, C'), contiguous."""
        self._along_rows(self.output.T, products, self.y_gathered)
        gathered = self.y_gathered.view(self.y_tiles)
        self.y_half.copy_(gathered.permute(0, 3, 1, 2, 4) if self.by_tile else gathered.permute(2, 1, 3, 0, 4))
        y = place if self.covered else self.y_plane
        torch.bmm(self.output.T.expand(self.down, -1, -1), self.y_half.flatten(2), out=y.view(self.y_columns))
        if not self.covered:
            place.copy_(self.y)

    def _along_rows(self, matrix, numbers, result):
        """`matrix` times `numbers`, of which p, along a row of a tile, comes first, or first after the tile."""
        rows = len(matrix)
        if self.by_tile:
            torch.bmm(matrix.expand(self.count, -1, -1), numbers.view(self.count, self.n, -1), out=result.view(self.count, rows, -1))
        else:
            torch.mm(matrix, numbers.view(self.n, -1), out=result.view(rows, -1))

    def transform_gradient(self, image_G):
        """image_G (H, W, C') -> (p q, tiles, C'), the transpose of `transform_products`."""
        if not self.covered:
            self.y.copy_(image_G)
        y = image_G if self.covered else self.y_plane
        torch.bmm(self.output.expand(self.down, -1, -1), y.reshape(self.y_columns), out=self.G_half.flatten(2))
        self.y_gathered.copy_(self.G_half.permute(3, 1, 0, 2, 4))
        torch.mm(self.output, self.y_gathered.view(self.m, -1), out=self.products.view(self.n, -1))
        return self.products
