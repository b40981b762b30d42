"""theta - relu(row ⊗ col) ⊙ grad in one pass over memory, with exact first and second derivatives.

Shapes, everywhere in this file (T tasks; one n1 x n2 matrix per adapted tensor of the network):
    theta (T, n1, n2)   parameters before the step, often one (n1, n2) matrix shared by all tasks
    g     (T, n1, n2)   inner gradient (`grad`)            a (T, n1)  left factor  (`row`), alpha folded in
    y     (T, n1, n2)   output (`out`)                     b (T, n2)  right factor (`col`)

Forward, with s = -1 for `modulated_step` and s = +1 and no theta for `modulate`:
    m_ij = relu(a_i b_j)      h_ij = 1[a_i b_j > 0]
    y    = theta + s m ⊙ g
Backward, given G = dL/dy:
    d_theta = G               (its sum over tasks where theta is shared)
    d_g     = s m ⊙ G
    d_a_i   = s sum_j h_ij b_j g_ij G_ij
    d_b_j   = s sum_i h_ij a_i g_ij G_ij
Double backward, given the cotangents X, p, q of d_g, d_a, d_b, with mdot_ij = h_ij (p_i b_j + a_i q_j):
    to G    = s (m ⊙ X + mdot ⊙ g)
    to g    = s mdot ⊙ G
    to a_i  = s sum_j h_ij G_ij (b_j X_ij + q_j g_ij)
    to b_j  = s sum_i h_ij G_ij (a_i X_ij + p_i g_ij)
The derivative of h is zero almost everywhere; at a_i b_j = 0 relu's subgradient 0 is used, as PyTorch does.
relu is positively homogeneous, so a step size alpha >= 0 is folded into `row` by the caller:
alpha relu(a b^T) = relu((alpha a) b^T). A learned alpha that may reach 0 is better folded into g: at 0 relu passes no gradient.

All tensors of a list share each launch: at Conv-4 sizes a launch costs more than its memory traffic. The sums
over j and i are made in two stages without atomics (each tile writes its partial sums, a second kernel adds
them in a fixed order), so repeated runs agree bit for bit.

A theta that all tasks share, as in the first inner step, is read from memory once: the programs of one tile and
all tasks follow each other, and find it in the L2 cache. Its gradient, the sum of G over tasks, is made where G is
read anyway: of a large matrix a program takes its tile of all tasks, one after the other, of a small one, whose
G is still in the cache, the second kernel adds it up.
"""

import contextlib
import functools
import inspect
import itertools
from typing import NamedTuple

import torch
from torch.autograd import Function

try:
    import triton
    import triton.language as tl
except ImportError:                      # a machine without a GPU: the eager path needs no Triton
    triton = tl = None

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_TENSORS_PER_LAUNCH = 8               # a kernel holds one copy of its code per tensor
CLOSED_FROM = 2 ** 14                    # elements (T n1 n2): a CPU gains less by the closed forms below
TILE = 1024                              # elements: 16 x 64 on 4 warps stays under 128 registers a thread
SUM_BLOCK = (16, 64)                     # (partial sums, vector entries) added at a time by the second stage
LARGE = 2 ** 20                          # elements (n1 n2) from which there are tiles enough to fill a GPU for each task alone
# Fusion of multiply and add is named because Triton's default for it is changing.
LAUNCH_OPTIONS = {"num_warps": 4, "enable_fp_fusion": True}


# ---------------------------------------------------------------------------------------------------------
# Triton kernels. Pointers come as tuples with one entry per tensor k. SHAPES[k] = (n1, n2); BLOCKS[k] =
# (tile rows, tile columns, tiles a program walks down); tensor k owns programs FIRST[k] to FIRST[k + 1] - 1
# of each task; its partial sums start at OFFSETS[k] = (of a, of b) in a task's WIDTH entries of `partial`.
# ---------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _relu(x):
        return tl.where(x <= 0, 0.0, x)                  # not a maximum: that would turn a NaN into 0

    @triton.jit
    def _span(index, BLOCK: tl.constexpr, N):
        """Return the BLOCK coordinates of block `index` and which of them are below N."""
        at = index * BLOCK + tl.arange(0, BLOCK)
        return at, at < N

    @triton.jit
    def _forward_tiles(theta, grad, row, col, out, task, tile, k: tl.constexpr, SHAPES: tl.constexpr,
                       BLOCKS: tl.constexpr, THETA_STRIDES: tl.constexpr, STEP: tl.constexpr,
                       ACC: tl.constexpr):
        N1: tl.constexpr = SHAPES[k][0]
        N2: tl.constexpr = SHAPES[k][1]
        ROWS: tl.constexpr = BLOCKS[k][0]
        COLS: tl.constexpr = BLOCKS[k][1]
        COL_TILES: tl.constexpr = (N2 + COLS - 1) // COLS
        j, j_in = _span(tile % COL_TILES, COLS, N2)
        b = tl.load(col + task * N2 + j, j_in, 0.0).to(ACC)
        for step in range(BLOCKS[k][2]):
            i, i_in = _span((tile // COL_TILES) * BLOCKS[k][2] + step, ROWS, N1)
            at = i[:, None] * N2 + j[None, :]
            inside = i_in[:, None] & j_in[None, :]
            a = tl.load(row + task * N1 + i, i_in, 0.0).to(ACC)
            g = tl.load(grad + task * (N1 * N2) + at, inside, 0.0).to(ACC)
            y = _relu(a[:, None] * b[None, :]) * g
            if STEP:
                y = tl.load(theta + task * THETA_STRIDES[k] + at, inside, 0.0).to(ACC) - y
            tl.store(out + task * (N1 * N2) + at, y.to(out.dtype.element_ty), inside)

    @triton.jit
    def _forward_kernel(
        theta,                           # read   (T, n1, n2) each, or (n1, n2) where THETA_STRIDES[k] is 0
        grad,                            # read   (T, n1, n2) each
        row,                             # read   (T, n1) each
        col,                             # read   (T, n2) each
        out,                             # write  (T, n1, n2) each
        SHAPES: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr,
        THETA_STRIDES: tl.constexpr,     # elements from one task's theta to the next
        STEP: tl.constexpr,              # True: theta - m ⊙ g; False: m ⊙ g, theta is not read
        ACC: tl.constexpr,               # arithmetic type: float32, or float64 for float64 tensors
    ):
        program = tl.program_id(0)
        PROGRAMS: tl.constexpr = FIRST[len(grad)]
        tasks = tl.num_programs(0) // PROGRAMS
        task = (program % tasks).to(tl.int64)            # 64 bits: T n1 n2 may pass 2**31
        tile = program // tasks                          # the tasks of a tile in turn: they read the same theta
        for k in tl.static_range(len(grad)):
            if (tile >= FIRST[k]) & (tile < FIRST[k + 1]):
                _forward_tiles(theta[k], grad[k], row[k], col[k], out[k], task, tile - FIRST[k], k,
                               SHAPES, BLOCKS, THETA_STRIDES, STEP, ACC)

    @triton.jit
    def _backward_terms(a, b, g, G, SIGN: tl.constexpr):
        """Of one tile: d_g (rows, columns) and what it adds to d_a (rows) and d_b (columns)."""
        product = a[:, None] * b[None, :]
        open_gG = SIGN * tl.where(product <= 0, 0.0, g * G)
        return SIGN * (_relu(product) * G), tl.sum(open_gG * b[None, :], 1), tl.sum(open_gG * a[:, None], 0)

    @triton.jit
    def _backward_tiles(out_grad, grad, row, col, d_grad, partial, task, tile, k: tl.constexpr,
                        SHAPES: tl.constexpr, BLOCKS: tl.constexpr, OFFSETS: tl.constexpr,
                        WIDTH: tl.constexpr, SIGN: tl.constexpr, ACC: tl.constexpr):
        N1: tl.constexpr = SHAPES[k][0]
        N2: tl.constexpr = SHAPES[k][1]
        ROWS: tl.constexpr = BLOCKS[k][0]
        COLS: tl.constexpr = BLOCKS[k][1]
        COL_TILES: tl.constexpr = (N2 + COLS - 1) // COLS
        partial += task * WIDTH
        j, j_in = _span(tile % COL_TILES, COLS, N2)
        b = tl.load(col + task * N2 + j, j_in, 0.0).to(ACC)
        d_b = tl.zeros((COLS,), ACC)
        for step in range(BLOCKS[k][2]):
            i, i_in = _span((tile // COL_TILES) * BLOCKS[k][2] + step, ROWS, N1)
            at = i[:, None] * N2 + j[None, :]
            inside = i_in[:, None] & j_in[None, :]
            a = tl.load(row + task * N1 + i, i_in, 0.0).to(ACC)
            g = tl.load(grad + task * (N1 * N2) + at, inside, 0.0).to(ACC)
            G = tl.load(out_grad + task * (N1 * N2) + at, inside, 0.0).to(ACC)
            d_g, to_a, to_b = _backward_terms(a, b, g, G, SIGN)
            tl.store(d_grad + task * (N1 * N2) + at, d_g.to(d_grad.dtype.element_ty), inside)
            tl.store(partial + OFFSETS[k][0] + (tile % COL_TILES) * N1 + i, to_a, i_in)
            d_b += to_b
        tl.store(partial + OFFSETS[k][1] + (tile // COL_TILES) * N2 + j, d_b, j_in)

    @triton.jit
    def _backward_kernel(
        out_grad,                        # read   (T, n1, n2) each: G
        grad,                            # read   (T, n1, n2) each
        row,                             # read   (T, n1) each
        col,                             # read   (T, n2) each
        d_grad,                          # write  (T, n1, n2) each
        partial,                         # write  (T, WIDTH): sums over one tile of the terms of d_a and d_b
        SHAPES: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr, OFFSETS: tl.constexpr,
        WIDTH: tl.constexpr,
        SIGN: tl.constexpr,              # s
        ACC: tl.constexpr,               # arithmetic type, also that of `partial`
    ):
        program = tl.program_id(0)
        PROGRAMS: tl.constexpr = FIRST[len(grad)]
        task = (program // PROGRAMS).to(tl.int64)
        tile = program % PROGRAMS
        for k in tl.static_range(len(grad)):
            if (tile >= FIRST[k]) & (tile < FIRST[k + 1]):
                _backward_tiles(out_grad[k], grad[k], row[k], col[k], d_grad[k], partial, task,
                                tile - FIRST[k], k, SHAPES, BLOCKS, OFFSETS, WIDTH, SIGN, ACC)

    @triton.jit
    def _shared_backward_tiles(out_grad, grad, row, col, d_theta, d_grad, partial, tasks, tile, k: tl.constexpr,
                               SHAPES: tl.constexpr, BLOCKS: tl.constexpr, OFFSETS: tl.constexpr,
                               WIDTH: tl.constexpr, SIGN: tl.constexpr, ACC: tl.constexpr):
        N1: tl.constexpr = SHAPES[k][0]
        N2: tl.constexpr = SHAPES[k][1]
        ROWS: tl.constexpr = BLOCKS[k][0]
        COLS: tl.constexpr = BLOCKS[k][1]
        COL_TILES: tl.constexpr = (N2 + COLS - 1) // COLS
        i, i_in = _span(tile // COL_TILES, ROWS, N1)
        j, j_in = _span(tile % COL_TILES, COLS, N2)
        at = i[:, None] * N2 + j[None, :]
        inside = i_in[:, None] & j_in[None, :]
        total = tl.zeros((ROWS, COLS), ACC)
        task = tl.zeros((), tl.int64)
        while task < tasks:                              # Triton 3.6's interpreter counts no `for` to a number it is given
            a = tl.load(row + task * N1 + i, i_in, 0.0).to(ACC)
            b = tl.load(col + task * N2 + j, j_in, 0.0).to(ACC)
            g = tl.load(grad + task * (N1 * N2) + at, inside, 0.0).to(ACC)
            G = tl.load(out_grad + task * (N1 * N2) + at, inside, 0.0).to(ACC)
            total += G
            d_g, to_a, to_b = _backward_terms(a, b, g, G, SIGN)
            tl.store(d_grad + task * (N1 * N2) + at, d_g.to(d_grad.dtype.element_ty), inside)
            sums = partial + task * WIDTH
            tl.store(sums + OFFSETS[k][0] + (tile % COL_TILES) * N1 + i, to_a, i_in)
            tl.store(sums + OFFSETS[k][1] + (tile // COL_TILES) * N2 + j, to_b, j_in)
            task += 1
        tl.store(d_theta + at, total.to(d_theta.dtype.element_ty), inside)

    @triton.jit(do_not_specialize=["tasks"])
    def _shared_backward_kernel(
        out_grad,                        # read   (T, n1, n2) each: G
        grad,                            # read   (T, n1, n2) each
        row,                             # read   (T, n1) each
        col,                             # read   (T, n2) each
        d_theta,                         # write  (n1, n2) each: G summed over tasks
        d_grad,                          # write  (T, n1, n2) each
        partial,                         # write  (T, WIDTH): as in _backward_kernel
        tasks,                           # T; tensor k owns programs FIRST[k] to FIRST[k + 1] - 1, each for all tasks
        SHAPES: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr, OFFSETS: tl.constexpr,
        WIDTH: tl.constexpr, SIGN: tl.constexpr, ACC: tl.constexpr,
    ):
        tile = tl.program_id(0)
        for k in tl.static_range(len(grad)):
            if (tile >= FIRST[k]) & (tile < FIRST[k + 1]):
                _shared_backward_tiles(out_grad[k], grad[k], row[k], col[k], d_theta[k], d_grad[k], partial, tasks,
                                       tile - FIRST[k], k, SHAPES, BLOCKS, OFFSETS, WIDTH, SIGN, ACC)

    @triton.jit
    def _double_backward_tiles(out_grad, grad, row, col, x, p, q, to_out_grad, to_grad, partial, task, tile,
                               k: tl.constexpr, SHAPES: tl.constexpr, BLOCKS: tl.constexpr,
                               OFFSETS: tl.constexpr, WIDTH: tl.constexpr, HAS_X: tl.constexpr,
                               SIGN: tl.constexpr, ACC: tl.constexpr):
        N1: tl.constexpr = SHAPES[k][0]
        N2: tl.constexpr = SHAPES[k][1]
        ROWS: tl.constexpr = BLOCKS[k][0]
        COLS: tl.constexpr = BLOCKS[k][1]
        COL_TILES: tl.constexpr = (N2 + COLS - 1) // COLS
        partial += task * WIDTH
        j, j_in = _span(tile % COL_TILES, COLS, N2)
        b = tl.load(col + task * N2 + j, j_in, 0.0).to(ACC)
        dot_b = tl.load(q + task * N2 + j, j_in, 0.0).to(ACC)
        to_b = tl.zeros((COLS,), ACC)
        for step in range(BLOCKS[k][2]):
            i, i_in = _span((tile // COL_TILES) * BLOCKS[k][2] + step, ROWS, N1)
            at = i[:, None] * N2 + j[None, :]
            inside = i_in[:, None] & j_in[None, :]
            a = tl.load(row + task * N1 + i, i_in, 0.0).to(ACC)
            dot_a = tl.load(p + task * N1 + i, i_in, 0.0).to(ACC)
            g = tl.load(grad + task * (N1 * N2) + at, inside, 0.0).to(ACC)
            G = tl.load(out_grad + task * (N1 * N2) + at, inside, 0.0).to(ACC)
            product = a[:, None] * b[None, :]
            m_dot = tl.where(product <= 0, 0.0, dot_a[:, None] * b[None, :] + a[:, None] * dot_b[None, :])
            open_G = SIGN * tl.where(product <= 0, 0.0, G)
            to_G = m_dot * g
            to_a = open_G * (dot_b[None, :] * g)
            to_b_terms = open_G * (dot_a[:, None] * g)
            if HAS_X:
                X = tl.load(x + task * (N1 * N2) + at, inside, 0.0).to(ACC)
                to_G += _relu(product) * X
                to_a += open_G * (b[None, :] * X)
                to_b_terms += open_G * (a[:, None] * X)
            to_G = (SIGN * to_G).to(to_out_grad.dtype.element_ty)
            to_g = (SIGN * m_dot * G).to(to_grad.dtype.element_ty)
            tl.store(to_out_grad + task * (N1 * N2) + at, to_G, inside)
            tl.store(to_grad + task * (N1 * N2) + at, to_g, inside)
            tl.store(partial + OFFSETS[k][0] + (tile % COL_TILES) * N1 + i, tl.sum(to_a, 1), i_in)
            to_b += tl.sum(to_b_terms, 0)
        tl.store(partial + OFFSETS[k][1] + (tile // COL_TILES) * N2 + j, to_b, j_in)

    @triton.jit
    def _double_backward_kernel(
        out_grad,                        # read   (T, n1, n2) each: G
        grad,                            # read   (T, n1, n2) each
        row,                             # read   (T, n1) each
        col,                             # read   (T, n2) each
        x,                               # read   (T, n1, n2) each where HAS_X: cotangent of d_g
        p,                               # read   (T, n1) each: cotangent of d_a
        q,                               # read   (T, n2) each: cotangent of d_b
        to_out_grad,                     # write  (T, n1, n2) each
        to_grad,                         # write  (T, n1, n2) each
        partial,                         # write  (T, WIDTH): sums over one tile of the terms to a and to b
        SHAPES: tl.constexpr, BLOCKS: tl.constexpr, FIRST: tl.constexpr, OFFSETS: tl.constexpr,
        WIDTH: tl.constexpr, HAS_X: tl.constexpr, SIGN: tl.constexpr, ACC: tl.constexpr,
    ):
        program = tl.program_id(0)
        PROGRAMS: tl.constexpr = FIRST[len(grad)]
        task = (program // PROGRAMS).to(tl.int64)
        tile = program % PROGRAMS
        for k in tl.static_range(len(grad)):
            if (tile >= FIRST[k]) & (tile < FIRST[k + 1]):
                _double_backward_tiles(out_grad[k], grad[k], row[k], col[k], x[k], p[k], q[k], to_out_grad[k],
                                       to_grad[k], partial, task, tile - FIRST[k], k, SHAPES, BLOCKS,
                                       OFFSETS, WIDTH, HAS_X, SIGN, ACC)

    @triton.jit
    def _add_up(source, count, target, block, N: tl.constexpr, SUM_BLOCK: tl.constexpr, ACC: tl.constexpr):
        """Block `block` of source (count, N), summed over its first axis in a fixed order, into target (N,)."""
        PARTS: tl.constexpr = SUM_BLOCK[0]
        ENTRIES: tl.constexpr = SUM_BLOCK[1]
        i, i_in = _span(block, ENTRIES, N)
        total = tl.zeros((ENTRIES,), tl.float64)         # tasks may be many; one addition for PARTS numbers
        part = tl.zeros((), tl.int64)
        while part * PARTS < count:
            c, c_in = _span(part, PARTS, count)
            inside = c_in[:, None] & i_in[None, :]
            total += tl.sum(tl.load(source + c[:, None] * N + i[None, :], inside, 0.0).to(ACC), 0).to(tl.float64)
            part += 1
        tl.store(target + i, total.to(ACC).to(target.dtype.element_ty), i_in)

    @triton.jit
    def _sum_partial(partial, vector, task, block, v: tl.constexpr, SUMS: tl.constexpr, WIDTH: tl.constexpr,
                     SUM_BLOCK: tl.constexpr, ACC: tl.constexpr):
        COUNT: tl.constexpr = SUMS[v][1]
        N: tl.constexpr = SUMS[v][2]
        _add_up(partial + task * WIDTH + SUMS[v][0], COUNT, vector + task * N, block, N, SUM_BLOCK, ACC)

    @triton.jit
    def _sum_tasks(out_grad, d_theta, tasks, block, k: tl.constexpr, ELEMENTS: tl.constexpr, SUM_BLOCK: tl.constexpr,
                   ACC: tl.constexpr):
        N: tl.constexpr = ELEMENTS[k]
        _add_up(out_grad, tasks, d_theta, block, N, SUM_BLOCK, ACC)

    @triton.jit
    def _sum_kernel(
        partial,                         # read   (T, WIDTH)
        vectors,                         # write  (T, n) each: all row results, then all column results
        out_grad,                        # read   (T, n1, n2) each: G
        d_theta,                         # write  (n1, n2) each: G summed over tasks
        SUMS: tl.constexpr,              # per vector (where its partial sums start, their count, n)
        SUM_FIRST: tl.constexpr,         # vector v owns programs SUM_FIRST[v] to SUM_FIRST[v + 1] - 1 of each task
        ELEMENTS: tl.constexpr,          # n1 n2 of each d_theta; () where there is none
        THETA_FIRST: tl.constexpr,       # d_theta k owns programs THETA_FIRST[k] to THETA_FIRST[k + 1] - 1 of those that follow
        WIDTH: tl.constexpr, SUM_BLOCK: tl.constexpr,
        ACC: tl.constexpr,               # arithmetic type
    ):
        program = tl.program_id(0)
        PROGRAMS: tl.constexpr = SUM_FIRST[len(vectors)]
        tasks = (tl.num_programs(0) - THETA_FIRST[len(ELEMENTS)]) // PROGRAMS
        task = (program // PROGRAMS).to(tl.int64)
        if task < tasks:
            block = program % PROGRAMS
            for v in tl.static_range(len(vectors)):
                if (block >= SUM_FIRST[v]) & (block < SUM_FIRST[v + 1]):
                    _sum_partial(partial, vectors[v], task, block - SUM_FIRST[v], v, SUMS, WIDTH, SUM_BLOCK, ACC)
        else:
            block = program - tasks * PROGRAMS
            for k in tl.static_range(len(ELEMENTS)):
                if (block >= THETA_FIRST[k]) & (block < THETA_FIRST[k + 1]):
                    _sum_tasks(out_grad[k], d_theta[k], tasks, block - THETA_FIRST[k], k, ELEMENTS, SUM_BLOCK, ACC)


# ---------------------------------------------------------------------------------------------------------
# Launchers: (tuples of tensors, one entry per adapted tensor) -> tuples of tensors.
# ---------------------------------------------------------------------------------------------------------

class Plan(NamedTuple):
    """How the programs of a launch are shared out among the matrices; see the kernels' banner."""

    shapes: tuple
    blocks: tuple
    first: tuple
    offsets: tuple
    width: int
    sums: tuple
    sum_first: tuple


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _block(n1: int, n2: int) -> tuple:
    """Return (tile rows, tile columns, tiles a program walks down) for an n1 x n2 matrix.

    It depends on the matrix alone, never on T: a task's result is the same in every batch.
    """
    columns = min(_power_of_two(n2), TILE // min(_power_of_two(n1), 16))
    rows = min(_power_of_two(n1), TILE // columns)
    # Walking down divides the partial sums of b by four; small matrices need the programs more.
    return rows, columns, 4 if n1 * n2 >= 2 ** 20 else 1


def _shared_block(n1: int, n2: int) -> tuple:
    """The same for the programs that take a tile of all tasks: twice as tall, so that there are fewer partial sums of b."""
    rows, columns, _ = _block(n1, n2)
    return min(2 * rows, _power_of_two(n1)), columns, 1


@functools.lru_cache(maxsize=256)
def _plan(shapes: tuple, shared: bool = False) -> Plan:
    for n1, n2 in shapes:
        if n1 * n2 >= 2 ** 31:           # inside a task the kernels count elements in 32 bits
            raise ValueError(f"a {n1} x {n2} matrix is too large for the Triton kernels: n1 * n2 must be "
                             f'below 2**31; choose kernel "eager"')
    blocks = tuple((_shared_block if shared else _block)(n1, n2) for n1, n2 in shapes)
    first, offsets, row_sums, col_sums, width = [0], [], [], [], 0
    for (n1, n2), (rows, columns, steps) in zip(shapes, blocks):
        down, across = -(-n1 // (rows * steps)), -(-n2 // columns)
        first.append(first[-1] + down * across)
        offsets.append((width, width + across * n1))
        row_sums.append((width, across, n1))
        col_sums.append((width + across * n1, down, n2))
        width += across * n1 + down * n2
    sums = tuple(row_sums + col_sums)
    return Plan(shapes, blocks, tuple(first), tuple(offsets), width, sums, _sum_programs(n for _, _, n in sums))


def _sum_programs(sizes) -> tuple:
    """Return where the programs of each sum of `sizes` entries start, and where the last one's end."""
    return tuple(itertools.accumulate((-(-n // SUM_BLOCK[1]) for n in sizes), initial=0))


def _plan_for(grads, shared: bool = False) -> Plan:
    return _plan(tuple(tuple(grad.shape[1:]) for grad in grads), shared)


def _dense(tensors) -> tuple:
    """Return the tensors in contiguous storage: the kernels compute addresses from shapes alone."""
    return tuple(tensor.contiguous() for tensor in tensors)


def _empty(tensors) -> tuple:
    # Not empty_like: that would repeat the strides of an expanded or transposed tensor.
    return tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in tensors)


def _accumulator(grads) -> tuple:
    """Return the arithmetic type of the kernels and the same as a torch dtype."""
    double = grads[0].dtype == torch.float64
    return (tl.float64, torch.float64) if double else (tl.float32, torch.float32)


def _launch(kernel, programs: int, tensor: torch.Tensor, *arguments) -> None:
    if programs >= 2 ** 31:
        raise ValueError(f"the tiles of all {tensor.shape[0]} tasks exceed the 2**31 - 1 programs of one launch: "
                         f"pass fewer tasks at a time")
    launch(kernel, (programs,), tensor, *arguments)


def launch(kernel, grid: tuple, tensor: torch.Tensor, *arguments, **options) -> None:
    """Start a Triton kernel on the device of `tensor`; Triton by itself takes the current one."""
    with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
        kernel[grid](*arguments, **LAUNCH_OPTIONS | options)


def _launch_forward(sign: int, thetas, grads, rows, cols) -> tuple:
    """Return y for each tensor; `thetas`, (n1, n2) or (T, n1, n2) each, is empty when sign is +1."""
    plan, (acc, _) = _plan_for(grads), _accumulator(grads)
    repeated = lambda theta: theta.dim() == 3 and theta.stride(0) == 0 and theta[0].is_contiguous()      # an expanded view
    thetas = tuple(theta[0] if repeated(theta) else theta.contiguous() for theta in thetas)
    strides = tuple(0 if theta.dim() == 2 else theta[0].numel() for theta in thetas) or (0,) * len(grads)
    grads, out = _dense(grads), _empty(grads)
    _launch(_forward_kernel, plan.first[-1] * len(grads[0]), grads[0], thetas or grads, grads, _dense(rows), _dense(cols),
            out, plan.shapes, plan.blocks, plan.first, strides, sign < 0, acc)
    return out


def _launch_sums(plan: Plan, acc, partial, rows, cols, out_grads=()) -> tuple:
    """Add the partial sums (T, plan.width) up; return `out_grads` summed over tasks, then vectors shaped like rows and cols."""
    d_thetas, vectors = _empty([G[0] for G in out_grads]), _empty(rows) + _empty(cols)
    elements = tuple(d_theta.numel() for d_theta in d_thetas)
    first = _sum_programs(elements)
    _launch(_sum_kernel, plan.sum_first[-1] * len(partial) + first[-1], partial, partial, vectors, out_grads or vectors,
            d_thetas or vectors, plan.sums, plan.sum_first, elements, first, plan.width, SUM_BLOCK, acc)
    return d_thetas + vectors


def _launch_backward(sign: int, shared, out_grads, grads, rows, cols) -> tuple:
    """Return d_theta of each tensor whose theta is shared, then d_g of each, d_a of each and d_b of each.

    shared: for each tensor whether theta is one matrix for all tasks; empty where there is no theta.
    """
    shared = shared or (False,) * len(grads)
    apart = [one and grad[0].numel() >= LARGE for one, grad in zip(shared, grads)]
    results = {}                         # (0 for d_theta to 3 for d_b, tensor) -> gradient
    for large in set(apart):             # tensors of both kinds need two launches
        ks = [k for k, of_this_kind in enumerate(apart) if of_this_kind == large]
        summed = [k for k in ks if shared[k]]
        found = (_launch_large_backward if large else _launch_small_backward)(
            sign, [shared[k] for k in ks], *(tuple(group[k] for k in ks) for group in (out_grads, grads, rows, cols)))
        keys = [(0, k) for k in summed] + [(kind, k) for kind in (1, 2, 3) for k in ks]
        results.update(zip(keys, found, strict=True))
    return tuple(results[key] for key in sorted(results))


def _launch_small_backward(sign: int, shared, out_grads, grads, rows, cols) -> tuple:
    plan, (acc, acc_dtype) = _plan_for(grads), _accumulator(grads)
    d_grads, grads, out_grads = _empty(grads), _dense(grads), _dense(out_grads)
    partial = torch.empty((grads[0].shape[0], plan.width), dtype=acc_dtype, device=grads[0].device)
    _launch(_backward_kernel, plan.first[-1] * len(partial), partial, out_grads, grads, _dense(rows), _dense(cols),
            d_grads, partial, plan.shapes, plan.blocks, plan.first, plan.offsets, plan.width, sign, acc)
    summed = tuple(G for one, G in zip(shared, out_grads) if one)
    found = _launch_sums(plan, acc, partial, rows, cols, summed)
    return found[:len(summed)] + d_grads + found[len(summed):]


def _launch_large_backward(sign: int, shared, out_grads, grads, rows, cols) -> tuple:
    plan, (acc, acc_dtype) = _plan_for(grads, shared=True), _accumulator(grads)
    d_thetas, d_grads, grads = _empty([grad[0] for grad in grads]), _empty(grads), _dense(grads)
    tasks = len(grads[0])
    partial = torch.empty((tasks, plan.width), dtype=acc_dtype, device=grads[0].device)
    _launch(_shared_backward_kernel, plan.first[-1], partial, _dense(out_grads), grads, _dense(rows), _dense(cols),
            d_thetas, d_grads, partial, tasks, plan.shapes, plan.blocks, plan.first, plan.offsets, plan.width, sign, acc)
    return d_thetas + d_grads + _launch_sums(plan, acc, partial, rows, cols)


def _launch_double_backward(sign: int, out_grads, grads, rows, cols, xs, ps, qs) -> tuple:
    """Return the gradients to G of each tensor, then to g, a, b; `xs` is empty when d_g was not used."""
    plan, (acc, acc_dtype) = _plan_for(grads), _accumulator(grads)
    to_out_grads, to_grads, grads = _empty(grads), _empty(grads), _dense(grads)
    partial = torch.empty((grads[0].shape[0], plan.width), dtype=acc_dtype, device=grads[0].device)
    _launch(_double_backward_kernel, plan.first[-1] * len(partial), partial, _dense(out_grads), grads, _dense(rows),
            _dense(cols), _dense(xs) or grads, _dense(ps), _dense(qs), to_out_grads, to_grads, partial,
            plan.shapes, plan.blocks, plan.first, plan.offsets, plan.width, bool(xs), sign, acc)
    return to_out_grads + to_grads + _launch_sums(plan, acc, partial, rows, cols)


# ---------------------------------------------------------------------------------------------------------
# The same three in PyTorch, for CPUs: few passes over memory, in place where it can be, and h is never
# formed. m is of degree one in a and in b, so that h_ij b_j = m_ij / a_i and h_ij a_i = m_ij / b_j, where
# 1 / 0 stands for 0. With p' = p / a and q' = q / b:
#     mdot_ij = m_ij (p'_i + q'_j)           d_a_i = sum_j (d_g ⊙ g)_ij / a_i           and so on
# Derivatives of factors below the smallest normal number (1e-38) are 0; infinite numbers may give NaN in a
# derivative where the formulas above do not. Values are exact.
# ---------------------------------------------------------------------------------------------------------

def _in_float32(launch):
    """Let `launch` compute 16-bit tensors in float32, as the Triton kernels do."""
    @functools.wraps(launch)
    def wrapped(sign, *groups):
        dtype = groups[-1][0].dtype
        if dtype in (torch.float32, torch.float64):
            return launch(sign, *groups)
        return tuple(t.to(dtype) for t in launch(sign, *(tuple(t.float() for t in group) for group in groups)))
    return wrapped


def _signed_mask(sign: int, row, col):
    """s m, (T, n1, n2)."""
    if sign > 0:
        return (row.unsqueeze(2) * col.unsqueeze(1)).relu_()
    return (row.neg().unsqueeze(2) * col.unsqueeze(1)).clamp_max_(0)


def _inverse(v):
    """1 / v, 0 where v is 0 or so small that 1 / v may overflow."""
    return v.reciprocal().masked_fill_(v.abs() < torch.finfo(v.dtype).tiny, 0.0)


@_in_float32
def _closed_forward(sign: int, thetas, grads, rows, cols) -> tuple:
    """As `_launch_forward`."""
    ms = [_signed_mask(1, a, b) for a, b in zip(rows, cols)]
    if sign > 0:
        return tuple(m.mul_(g) for m, g in zip(ms, grads))
    return tuple(torch.addcmul(theta, m, g, value=-1, out=m) for theta, m, g in zip(thetas, ms, grads))


@_in_float32
def _closed_backward(sign: int, out_grads, grads, rows, cols) -> tuple:
    """As `_launch_backward` of no shared theta."""
    results = []
    for G, g, a, b in zip(out_grads, grads, rows, cols):
        d_g = _signed_mask(sign, a, b).mul_(G)
        terms = d_g * g
        results.append((d_g, terms.sum(2) * _inverse(a), terms.sum(1) * _inverse(b)))
    return tuple(result for group in zip(*results) for result in group)


@_in_float32
def _closed_double_backward(sign: int, out_grads, grads, rows, cols, xs, ps, qs) -> tuple:
    """As `_launch_double_backward`."""
    results = []
    for k, (G, g, a, b, p, q) in enumerate(zip(out_grads, grads, rows, cols, ps, qs)):
        over_a, over_b = _inverse(a), _inverse(b)
        p, q = p * over_a, q * over_b
        m, slope = _signed_mask(sign, a, b), p[:, :, None] + q[:, None, :]
        mG = m * G
        mGg = mG * g
        to_a, to_b = (q[:, None] @ mGg.mT)[:, 0], (p[:, None] @ mGg)[:, 0]      # a row times a matrix is the fast form
        if xs:
            to_G = m.mul_(torch.addcmul(xs[k], slope, g))
            mGX = torch.mul(mG, xs[k], out=mGg)
            to_a, to_b = to_a + mGX.sum(2), to_b + mGX.sum(1)
        else:
            to_G = m.mul_(slope).mul_(g)
        results.append((to_G, mG.mul_(slope), to_a * over_a, to_b * over_b))
    return tuple(result for group in zip(*results) for result in group)


# ---------------------------------------------------------------------------------------------------------
# Autograd. Functions take flat tensors, group after group: first all G, then all g, then all a, ...
# ---------------------------------------------------------------------------------------------------------

class _Form(NamedTuple):
    """What the Functions below need to know besides tensors."""

    sign: int                            # s
    triton: bool                         # else the closed forms in PyTorch
    shared: tuple                        # for each tensor whether theta is one matrix for all tasks; empty without theta

    def forward(self, *groups) -> tuple:
        return (_launch_forward if self.triton else _closed_forward)(self.sign, *groups)

    def backward(self, *groups) -> tuple:
        return _launch_backward(self.sign, self.shared, *groups) if self.triton else _closed_backward(self.sign, *groups)

    def double_backward(self, *groups) -> tuple:
        return (_launch_double_backward if self.triton else _closed_double_backward)(self.sign, *groups)


def _groups(tensors, count: int) -> list:
    size = len(tensors) // count
    return [tuple(tensors[start:start + size]) for start in range(0, len(tensors), size)]


def _mapped_first(value, axis, info):
    """Bring vmap's axis, of B entries, to the front, without a copy."""
    return value.expand(info.batch_size, *value.shape) if axis is None else value.movedim(axis, 0)


def _fold_vmap(function, info, in_dims, arguments) -> tuple:
    """Apply `function` with the mapped axis moved into the task axis; return its outputs and their axes."""
    folded = [_mapped_first(value, axis, info).flatten(0, 1) if isinstance(value, torch.Tensor) else value
              for value, axis in zip(arguments, in_dims)]
    outputs = function.apply(*folded)
    return tuple(out.unflatten(0, (info.batch_size, -1)) for out in outputs), (0,) * len(outputs)


class _Modulate(Function):
    """(form, thetas if its sign is -1, grads, rows, cols) -> y of each tensor."""

    @staticmethod
    def forward(form, *tensors):
        groups = _groups(tensors, 4 if form.sign < 0 else 3)
        return form.forward(*groups) if form.sign < 0 else form.forward((), *groups)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form = inputs[0]
        thetas = (len(inputs) - 1) // 4 if ctx.form.sign < 0 else 0       # no derivative needs theta: not kept
        ctx.save_for_backward(*inputs[1 + thetas:])

    @staticmethod
    def backward(ctx, *out_grads):
        gradients = _ModulateBackward.apply(ctx.form, *out_grads, *ctx.saved_tensors)
        summed = iter(gradients[:sum(ctx.form.shared)])
        d_theta = [next(summed) if one else G for one, G in zip(ctx.form.shared, out_grads)]
        return None, *d_theta, *gradients[sum(ctx.form.shared):]

    @staticmethod
    def vmap(info, in_dims, form, *tensors):
        # A shared theta becomes a view for each task: its gradient may not be summed over mapped entries.
        tasks, tensors, axes = _mapped_first(tensors[-1], in_dims[-1], info).shape[1], list(tensors), list(in_dims)
        for k, one in enumerate(form.shared):
            if one:
                tensors[k] = _mapped_first(tensors[k], axes[k + 1], info).unsqueeze(1).expand(-1, tasks, -1, -1)
                axes[k + 1] = 0
        return _fold_vmap(_Modulate, info, axes, (form._replace(shared=(False,) * len(form.shared)), *tensors))


class _ModulateBackward(Function):
    """(form, out_grads, grads, rows, cols) -> d_theta of those that are shared, d_g, d_a, d_b of each tensor."""

    @staticmethod
    def forward(form, *tensors):
        return form.backward(*_groups(tensors, 4))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form = inputs[0]
        ctx.save_for_backward(*inputs[1:])
        ctx.set_materialize_grads(False)     # X is absent when only the context gradient was used: skip it

    @staticmethod
    def backward(ctx, *cotangents):
        of_thetas, cotangents = cotangents[:sum(ctx.form.shared)], cotangents[sum(ctx.form.shared):]
        xs, ps, qs = _groups(cotangents, 3)
        _, grads, rows, cols = _groups(ctx.saved_tensors, 4)
        xs = () if all(x is None for x in xs) else _or_zeros(xs, grads)
        cotangents = *xs, *_or_zeros(ps, rows), *_or_zeros(qs, cols)
        gradients = list(_ModulateDoubleBackward.apply(ctx.form, bool(xs), *ctx.saved_tensors, *cotangents))
        for k, of_theta in zip((k for k, one in enumerate(ctx.form.shared) if one), of_thetas):
            if of_theta is not None:         # d_theta is the sum of G: each task's G gets its cotangent
                gradients[k] = gradients[k] + of_theta
        return None, *gradients

    @staticmethod
    def vmap(info, in_dims, form, *tensors):
        # The sums over tasks are not those over tasks and mapped entries, so they are made here.
        outputs, axes = _fold_vmap(_ModulateBackward, info, in_dims, (form._replace(shared=()), *tensors))
        summed = tuple(_mapped_first(G, axis, info).sum(1) for one, G, axis in zip(form.shared, tensors, in_dims[1:]) if one)
        return summed + outputs, (0,) * len(summed) + axes


def _or_zeros(cotangents, like) -> tuple:
    return tuple(torch.zeros_like(l) if c is None else c for c, l in zip(cotangents, like))


class _ModulateDoubleBackward(Function):
    """(form, has_x, out_grads, grads, rows, cols, xs if has_x, ps, qs) -> gradients to G, g, a, b of each."""

    @staticmethod
    def forward(form, has_x, *tensors):
        groups = _groups(tensors, 7 if has_x else 6)
        return form.double_backward(*groups[:4], groups[4] if has_x else (), *groups[-2:])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.form, ctx.has_x = inputs[:2]
        ctx.save_for_backward(*inputs[2:])

    @staticmethod
    def backward(ctx, *cotangents):
        # Third order, which the method never asks for: the closed formula in PyTorch, right at all orders.
        formula = functools.partial(_double_backward_formula, ctx.form.sign, ctx.has_x)
        _, pull_back = torch.func.vjp(formula, *ctx.saved_tensors)
        return None, None, *pull_back(cotangents)

    @staticmethod
    def vmap(info, in_dims, *arguments):
        return _fold_vmap(_ModulateDoubleBackward, info, in_dims, arguments)


for _function in (_Modulate, _ModulateBackward, _ModulateDoubleBackward):      # apply() asks for it, 30 us where it is not kept
    _function.forward.__signature__ = inspect.signature(_function.forward)


def _double_backward_formula(sign, has_x, *tensors) -> tuple:
    """Return what `_launch_double_backward` returns, by the formulas at the head of this file."""
    groups = _groups(tensors, 7 if has_x else 6)
    xs = groups[4] if has_x else [torch.zeros_like(grad) for grad in groups[1]]
    results = []
    for G, g, a, b, X, p, q in zip(*groups[:4], xs, *groups[-2:]):
        a, p, b, q = a[:, :, None], p[:, :, None], b[:, None, :], q[:, None, :]
        product = a * b
        closed = product <= 0
        m, open_G = product.masked_fill(closed, 0), sign * G.masked_fill(closed, 0)
        m_dot = sign * (p * b + a * q).masked_fill(closed, 0)
        results.append((sign * m * X + m_dot * g, m_dot * G,
                        (open_G * (b * X + q * g)).sum(2), (open_G * (a * X + p * g)).sum(1)))
    return tuple(result for group in zip(*results) for result in group)


# ---------------------------------------------------------------------------------------------------------
# Public functions.
# ---------------------------------------------------------------------------------------------------------

def modulated_step(theta, grad, row, col, *, kernel: str = "auto"):
    """Return theta - relu(row ⊗ col) ⊙ grad, the modulated gradient step (paper, Eqs. 5 and 8 with the ReLU).

    The inner learning rate alpha >= 0 belongs in `row` (pass alpha * row): relu is positively homogeneous, so
    alpha relu(row ⊗ col) = relu((alpha row) ⊗ col). A vector parameter of n entries is the case n1 = 1.

    Args:
        theta: parameters, (T, n1, n2), or (n1, n2) shared by all tasks, whose gradient Triton sums where it is made; an
            expanded view is read uncopied.
        grad: inner gradient, (T, n1, n2).
        row: left factor, (T, n1).
        col: right factor, (T, n2).
        kernel: "auto" (Triton for CUDA tensors, "closed" for CPU tensors, "eager" elsewhere), "triton",
            "closed" (the derivatives' closed forms in PyTorch operations) or "eager" (formula and autograd).

    Each may also be a list or tuple with one entry per adapted tensor; these then share kernel launches. All
    tensors have one device and one dtype of float16, bfloat16, float32, float64; Triton computes 16-bit
    tensors in float32. First and second derivatives are exact, for autograd and torch.func; vmap works.
    Inside torch.compile the plain formula is used whatever `kernel` says: the compiler fuses it, while it
    refuses a hand-written autograd.Function or loses its second derivatives without an error.

    Returns:
        A tensor (T, n1, n2), or a list of them when lists came in.

    Raises:
        TypeError: a wrong type or dtype. ValueError: a wrong shape, device or kernel name.
        RuntimeError: Triton was asked for and cannot run here.
    """
    return _run(theta, grad, row, col, kernel, step=True)


def modulate(grad, row, col, *, kernel: str = "auto"):
    """Return relu(row ⊗ col) ⊙ grad, the modulated gradient alone; arguments as in `modulated_step`."""
    return _run(None, grad, row, col, kernel, step=False)


def modulated_step_reference(theta, grad, row, col):
    """Return `modulated_step` of single tensors in plain PyTorch, the reference of all other forms."""
    return theta - torch.relu(row[:, :, None] * col[:, None, :]) * grad


def modulate_reference(grad, row, col):
    """Return `modulate` of single tensors in plain PyTorch."""
    return torch.relu(row[:, :, None] * col[:, None, :]) * grad


def resolve_backend(kernel: str, device) -> str:
    """Return "triton", "closed" or "eager", what `kernel` means for tensors on `device`.

    Raises:
        ValueError: `kernel` is not "auto", "triton", "closed" or "eager".
        RuntimeError: Triton is wanted and is not installed, or the device is not a CUDA device and the
            interpreter (environment variable TRITON_INTERPRET=1 at start) is off.
    """
    if kernel not in ("auto", "triton", "closed", "eager"):
        raise ValueError(f'kernel must be "auto", "triton", "closed" or "eager", got {kernel!r}')
    kind = torch.device(device).type
    if kernel == "auto" and kind != "cuda":
        return "closed" if kind == "cpu" else "eager"
    if kernel in ("closed", "eager"):
        return kernel
    if triton is None:
        raise RuntimeError(f'kernel "{kernel}" on {device} needs Triton, which is not installed: '
                           f'install the package "triton" or choose kernel "eager"')
    interpreted = not isinstance(_forward_kernel, triton.runtime.JITFunction)
    if kind != "cuda" and not (kind == "cpu" and interpreted):
        raise RuntimeError(f'kernel "triton" runs on CUDA tensors, got {device}: move the tensors to a GPU, '
                           f'choose kernel "auto", "closed" or "eager", or set TRITON_INTERPRET=1 (slow, for checks)')
    return "triton"


def _run(theta, grad, row, col, kernel: str, step: bool):
    names = ("theta", "grad", "row", "col")[0 if step else 1:]
    groups = (theta, grad, row, col)[0 if step else 1:]
    single = isinstance(grad, torch.Tensor)
    groups = [[group] for group in groups] if single else _checked_lists(names, groups)
    entries, first = list(zip(*groups)), groups[-3][0]
    for index, entry in enumerate(entries):
        if not _fits(entry, first):
            _refuse(names, entry, "" if single else f"[{index}]", first)
    # True while torch.compile traces: it could drop second-order terms of the Functions without an error.
    backend = "eager" if torch.compiler.is_compiling() else resolve_backend(kernel, first.device)
    if backend == "eager":
        out = [(modulated_step_reference if step else modulate_reference)(*entry) for entry in entries]
    elif backend == "closed":
        out = _run_closed(entries, step)
    else:
        out = _run_functions(groups, step, by_triton=True)
    return out[0] if single else out


def _run_closed(entries, step: bool) -> list:
    large = [k for k, entry in enumerate(entries) if entry[-3].numel() >= CLOSED_FROM]
    out = [None if k in large else _small(*entry) for k, entry in enumerate(entries)]
    if large:
        groups = [list(group) for group in zip(*(entries[k] for k in large))]
        for k, y in zip(large, _run_functions(groups, step, by_triton=False)):
            out[k] = y
    return out


def _small(*entry):
    """The formula with one temporary less: (theta,) grad, row, col -> y."""
    *theta, grad, row, col = entry
    m = (row * col).unsqueeze(1) if row.shape[1] == 1 else row.unsqueeze(2) * col.unsqueeze(1)
    m = torch.relu(m)
    return torch.addcmul(theta[0], m, grad, value=-1) if theta else m * grad


def _run_functions(groups, step: bool, by_triton: bool) -> list:
    if step and not by_triton:              # a closed form gains nothing by the sum, and may not be asked for it
        groups = [[theta.expand(grad.shape) for theta, grad in zip(*groups[:2])], *groups[1:]]
    out = []
    for start in range(0, len(groups[0]), MAX_TENSORS_PER_LAUNCH):
        part = [group[start:start + MAX_TENSORS_PER_LAUNCH] for group in groups]
        form = _Form(-1 if step else 1, by_triton, tuple(theta.dim() == 2 for theta in part[0]) if step else ())
        out.extend(_Modulate.apply(form, *(tensor for group in part for tensor in group)))
    return out


def _checked_lists(names, groups) -> list:
    for name, group in zip(names, groups):
        if not isinstance(group, (list, tuple)):
            raise TypeError(f"{', '.join(names)} must be all tensors or all lists of tensors, but {name} is "
                            f"of type {type(group).__name__}")
    lengths = [len(group) for group in groups]
    if len(set(lengths)) > 1 or lengths[0] == 0:
        raise ValueError(f"lists {', '.join(names)} must have one common length of at least 1, got {lengths}")
    return [list(group) for group in groups]


def _fits(entry, first) -> bool:
    """Whether the tensors of one step fit together; `first` is the grad that sets dtype, device, T; quick."""
    *theta, grad, row, col = entry
    T, with_theta = torch.Tensor, len(theta) > 0      # torch 2.11's compiler takes no `not` of a tuple
    if not (isinstance(first, T) and isinstance(grad, T) and isinstance(row, T) and isinstance(col, T)
            and (not with_theta or isinstance(theta[0], T)) and grad.dim() == 3):
        return False
    tasks, n1, n2 = shape = grad.shape
    return (row.shape == (tasks, n1) and col.shape == (tasks, n2) and grad.numel() > 0 and tasks == first.shape[0]
            and grad.dtype == row.dtype == col.dtype == first.dtype and grad.dtype in DTYPES
            and grad.device == row.device == col.device == first.device
            and (not with_theta or (theta[0].shape == (n1, n2) or theta[0].shape == shape)
                 and theta[0].dtype == grad.dtype and theta[0].device == grad.device))


def _refuse(names, entry, where: str, first) -> None:
    """Raise an error that says why the tensors of one step do not fit together."""
    for name, tensor in zip(names, entry):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}{where} must be a tensor, got {type(tensor).__name__}")
    if not isinstance(first, torch.Tensor):
        return                               # the first entry itself is refused
    for name, tensor in zip(names, entry):
        if tensor.dtype not in DTYPES or tensor.dtype != first.dtype:
            raise TypeError(f"{name}{where} has dtype {tensor.dtype} beside a grad of {first.dtype}: all "
                            f"tensors must have one dtype out of float16, bfloat16, float32, float64")
        if tensor.device != first.device:
            raise ValueError(f"{name}{where} is on {tensor.device}, grad on {first.device}: use one device")
    grad = entry[-3]
    if grad.dim() != 3 or grad.numel() == 0:
        raise ValueError(f"grad{where} must have shape (T, n1, n2) without zeros, got {tuple(grad.shape)}")
    tasks, n1, n2 = grad.shape
    if tasks != first.shape[0]:
        raise ValueError(f"grad{where} holds {tasks} tasks, the first grad {first.shape[0]}: they must agree")
    allowed = {"theta": ((n1, n2), (tasks, n1, n2)), "row": ((tasks, n1),), "col": ((tasks, n2),)}
    for name, tensor in zip(names, entry):
        if name in allowed and tuple(tensor.shape) not in allowed[name]:
            raise ValueError(f"{name}{where} must have shape {' or '.join(map(str, allowed[name]))} for a "
                             f"grad of shape {tuple(grad.shape)}, got {tuple(tensor.shape)}")
