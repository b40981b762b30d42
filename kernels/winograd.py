"""3 x 3 convolutions on CPUs by Winograd's minimal filtering: matrix products with a quarter of the multiplications.

Four outputs of a filter with three taps, y_i = sum_t w_t x_(i + t), are y = OUTPUT^T (FILTER w * INPUT x), with 6 products
instead of 12: polynomials multiplied at the points 0, 1, -1, 1/2, -2 and infinity. A plane is cut into tiles of 4 x 4 outputs
with their 6 x 6 inputs; in both directions that is 36 products instead of 144, each a matrix product over channels and tiles:

    y = OUTPUT^T [FILTER w FILTER^T * INPUT x INPUT^T] OUTPUT         dL/dx: the same, of dL/dy and the filter turned round
    dL/dw = FILTER^T [sum over tiles of OUTPUT dL/dy OUTPUT^T * INPUT x INPUT^T] FILTER

Even transforms written in PyTorch are then faster for large planes, if the images go one by one through the same few buffers,
which stay in cache: with AVX-512, where PyTorch's own are as fast as a matrix product, and with AVX2, where its weight gradients
are half as fast as its convolutions. All tensors are channels-last, float32 (or float64, for tests).
"""

import math
from typing import NamedTuple

import torch

FILTER = torch.tensor([[15, 0, 0], [5, 5, 5], [-5, 5, -5], [-16, -8, -4], [1, -2, 4], [0, 0, 15]], dtype=torch.float64) / 15
INPUT = torch.tensor([[2, -3, -4, 3, 2, 0], [0, -2, 1, 5, 2, 0], [0, 2, -5, 1, 2, 0], [0, -4, -2, 4, 2, 0],
                      [0, 1, -2, -1, 2, 0], [0, 2, -3, -4, 3, 2]], dtype=torch.float64) / 2
OUTPUT = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [1, -1, 1, -1], [1, 1/2, 1/4, 1/8], [1, -2, 4, -8], [0, 0, 0, 1]],
                      dtype=torch.float64)


class Limits(NamedTuple):
    """Where it is faster than PyTorch's own. `numbers` are those of a plane's tiles times channels, 36 of which are held in each
    buffer: few do not pay, many leave the cache."""
    channels: int           # most that were measured
    convolve: range         # numbers, for 64 channels or more and one thread
    weights: dict           # threads: least numbers, for 32 channels or more


# Measured on EPYCs, by PyTorch's name of their instructions.
LIMITS = {"AVX2": Limits(128, range(2 ** 12, 2 ** 14 + 1), {1: 2 ** 11, 2: 2 ** 12}),
          "AVX512": Limits(320, range(3000, 2 ** 17), {1: 2 ** 11})}


def pays(x, weight) -> bool:
    """Whether `convolve` is faster than PyTorch's own here, for x (N, C, H, W) and weight (C', C, k, k): by measurement."""
    limits = _limits(x, weight)
    return (limits is not None and min(weight.shape[:2]) >= 64 and _numbers(x, weight) in limits.convolve
            and torch.get_num_threads() == 1)


def pays_for_weights(G, x, weight) -> bool:
    """Whether `weight_gradient` is, for G (N, C', H, W) too. PyTorch's is slower than its convolutions, so that less is needed."""
    limits = _limits(x, weight, G)
    least = limits and limits.weights.get(torch.get_num_threads())
    return bool(least) and min(weight.shape[:2]) >= 32 and _numbers(x, weight) >= least


def _limits(x, weight, *others) -> Limits | None:
    """Those of this CPU, if x (N, C, H, W) and weight (C', C, k, k) are of the kind that was measured; `others` enter the same
    products."""
    if x.device.type != "cpu" or any(torch._C._functorch.is_batchedtensor(t) for t in (x, weight, *others)):
        return None                                                                            # vmap takes no buffers
    if not (x.dtype == weight.dtype == torch.float32 and weight.shape[2:] == (3, 3) and len(x) >= 8 and min(x.shape[2:]) > 20
            and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)):
        return None
    limits = LIMITS.get(torch.backends.cpu.get_cpu_capability())
    return limits if limits and max(weight.shape[:2]) <= limits.channels else None


def _numbers(x, weight) -> int:
    return -(-x.shape[2] // 4) * -(-x.shape[3] // 4) * max(weight.shape[:2])


def convolve(x, weight):
    """x (N, C, H, W), weight (C', C, 3, 3) -> their convolution (N, C', H, W), zero-padded."""
    n, channels, out = len(x), x.shape[1], len(weight)
    tiles = _Tiles(x, out)
    filters = torch.einsum("ph,qv,ocvh->pqco", tiles.filter, tiles.filter, weight).reshape(36, channels, out)
    y = torch.empty((n, out, *x.shape[2:]), dtype=x.dtype, memory_format=torch.channels_last)
    for image, place in zip(x.permute(0, 2, 3, 1), y.permute(0, 2, 3, 1)):
        torch.bmm(tiles.transform_input(image), filters, out=tiles.products)
        place.copy_(tiles.transform_products())
    return y


def input_gradient(G, weight):
    """dL/dx (N, C, H, W) from G = dL/dy (N, C', H, W)."""
    return convolve(G, weight.flip(2, 3).transpose(0, 1))


def weight_gradient(G, x):
    """dL/dw (C', C, 3, 3) from G = dL/dy (N, C', H, W)."""
    tiles = _Tiles(x, G.shape[1])
    sums = x.new_zeros(36, x.shape[1], G.shape[1])
    for image, image_G in zip(x.permute(0, 2, 3, 1), G.permute(0, 2, 3, 1)):
        torch.baddbmm(sums, tiles.transform_input(image).mT, tiles.transform_gradient(image_G), out=sums)
    return torch.einsum("ph,qv,pqco->ocvh", tiles.filter, tiles.filter, sums.unflatten(0, (6, 6))).contiguous()


class _Tiles:
    """The buffers for one image of x (N, C, H, W) and its output of `out` channels, and the transforms between them.

    A transform first takes the columns of the plane, in place: one matrix product for each row of tiles. A copy then puts the
    tiles side by side, so that their rows are one product too. Of a tile's 6 x 6 numbers p counts along a row, q along a
    column. What a transform returns is a buffer, which the next call overwrites.
    """

    def __init__(self, x, out: int):
        channels, height, width = x.shape[1:]
        down, across = -(-height // 4), -(-width // 4)                     # tiles in a column and in a row of the plane
        self.filter, self.input, self.output = FILTER.to(x), INPUT.to(x), OUTPUT.to(x)
        self.down, numbers = down, 36 * down * across
        a, b, c = (x.new_empty(numbers * max(channels, out)) for _ in range(3))
        take = lambda memory, *shape: memory[: math.prod(shape)].view(shape)

        plane = x.new_zeros(4 * down + 2, 4 * across + 2, channels)
        row = plane.stride(0)
        self.x = plane[1:height + 1, 1:width + 1]
        self.x_columns = plane.as_strided((down, 6, row), (4 * row, row, 1))
        self.x_half = take(a, down, 6, row)
        self.x_half_tiles = a.as_strided((6, 6, down, across, channels), (channels, row, 6 * row, 4 * channels, 1))
        self.x_gathered = take(b, 6, 6, down, across, channels)
        self.x_transformed = take(a, 36, down * across, channels)

        plane = x.new_zeros(4 * down, 4 * across, out)
        self.y = plane[:height, :width]
        self.y_columns = plane.view(down, 4, -1)
        self.products = take(b, 36, down * across, out)
        self.y_gathered = take(c, 4, 6, down, across, out)
        self.y_half, self.G_half = take(a, down, 6, across, 4, out), take(b, down, 6, across, 4, out)

    def transform_input(self, image):
        """image (H, W, C) -> (p q, tiles, C)."""
        self.x.copy_(image)
        torch.bmm(self.input.expand(self.down, 6, 6), self.x_columns, out=self.x_half)
        self.x_gathered.copy_(self.x_half_tiles)
        torch.mm(self.input, self.x_gathered.view(6, -1), out=self.x_transformed.view(6, -1))
        return self.x_transformed

    def transform_products(self):
        """`products` (p q, tiles, C') -> the output (H, W, C')."""
        torch.mm(self.output.T, self.products.view(6, -1), out=self.y_gathered.view(4, -1))
        self.y_half.copy_(self.y_gathered.permute(2, 1, 3, 0, 4))
        torch.bmm(self.output.T.expand(self.down, 4, 6), self.y_half.flatten(2), out=self.y_columns)
        return self.y

    def transform_gradient(self, image_G):
        """image_G (H, W, C') -> (p q, tiles, C'), the transpose of `transform_products`."""
        self.y.copy_(image_G)
        torch.bmm(self.output.expand(self.down, 6, 4), self.y_columns, out=self.G_half.flatten(2))
        self.y_gathered.copy_(self.G_half.permute(3, 1, 0, 2, 4))
        torch.mm(self.output, self.y_gathered.view(4, -1), out=self.products.view(6, -1))
        return self.products
