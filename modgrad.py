"""ModGrad: gradient modulation for meta-learning (Simon, Koniusz, Nock, Harandi, ECCV 2020).

The inner step is   theta' = theta - alpha * M_tau ⊙ grad L_support(theta),   M_tau = relu(row col^T)   (Eqs. 5-8),
and the task speaks to M through a context vector nu, minus the gradient of the loss after a trial step (Eq. 9).

    paper       here             flag             where            shape
    ---------   --------------   --------------   --------------   ------------------------------------------------
    theta       theta            --adapt          Eq. 1            {name: (*shape)}, per task {name: (T, *shape)}
    Psi, psi_i  Generator        --init           Remark 4         one cell per adapted tensor, all share nu
    nu          nu               --context-dim    Eq. 9            (T, D)
    u           columns          --rank           Eq. 6            number of candidate columns the attention mixes
    phi_1/2     SisterNetwork    --hidden-cap     Eq. 6            nu -> logits (T, u), columns (T, u, n)
    a           weights          -                Eq. 7            softmax over u, (T, u)
    h_1 a_1     row              -                Eq. 8            (T, n1)
    h_2 a_2     col              -                Eq. 8            (T, n2)
    M           in kernels/      --factors        Eq. 8 + ReLU     relu(row ⊗ col), (T, n1, n2)
    alpha       alpha            --inner-lr       Eq. 5            scalar
    K           steps            --inner-steps    Algorithm 1      number of inner steps
    eta         noise_std        --gradient-noise Section 5.4      standard deviation of the noise on the raw gradient

Shapes everywhere: T tasks, N samples of one task, C channels, H and W pixels, D context size.

Three parts, each usable alone: the generator of M, networks as chains of stages whose tensors may be shared by
all tasks or be given per task, and the inner loop, which knows no network and only needs a function
``{name: (T, *shape)} -> losses (T,)``. A call takes all tasks of a meta-batch, on a GPU as one computation.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import (batch_norm, conv2d, first_block, first_blocks, linear, modulated_step, norm_pool, takes_blocks,
                     takes_first_block, takes_norm_pool, task_blocks)

Tensors = dict[str, Tensor]


# --- the generator of M (Eqs. 6-8) -----------------------------------------------------------------------------------

def factor_sizes(shape: Sequence[int], factors: str = "flat") -> tuple[int, int]:
    """Return (n1, n2), the matrix as which a tensor of `shape` is modulated; a vector gives (1, n).

    Linear (o, i): (o, i). Convolution (o, i, k, k'): "flat" gives (o k, i k') by a row-major view, as the authors'
    released code does; "natural" gives (o, i k k'), one row per output channel. Raises ValueError for other shapes.
    """
    if factors not in ("flat", "natural"):
        raise ValueError(f"factors must be 'flat' or 'natural', got {factors!r}")
    shape = tuple(shape)
    if len(shape) == 1:
        return 1, shape[0]
    if len(shape) == 2:
        return shape
    if len(shape) == 4:
        o, i, k1, k2 = shape
        return (o * k1, i * k2) if factors == "flat" else (o, i * k1 * k2)
    raise ValueError(f"cannot modulate a tensor of shape {shape}: a vector, a matrix or a 2-d convolution is needed")


class SisterNetwork(nn.Module):
    """phi: nu -> one vector, the attention-weighted mix of u candidate columns (Eqs. 6-7).

    Linear D -> hidden, ReLU, Linear hidden -> u + u n. hidden = n, as in the authors' released code (n = 64 and 192),
    but at most `hidden_cap`, as n = 1920 would ask for tens of millions of weights, and at least 64, as a few ReLU units
    can all be dead at nu = 0, which would silence the context for ever (n = 5 for a 5-way head).
    """

    def __init__(self, context_dim: int, n: int, columns: int, hidden_cap: int):
        super().__init__()
        self.n, self.columns = n, columns
        hidden = min(max(n, 64), hidden_cap)
        self.inner = nn.Linear(context_dim, hidden)
        self.outer = nn.Linear(hidden, columns + columns * n)

    def forward(self, nu: Tensor) -> Tensor:
        """nu (T, D) -> (T, n)."""
        return self.mix(self.outer(F.relu(self.inner(nu))))

    def mix(self, out: Tensor) -> Tensor:
        """The last layer's output (..., u + u n) -> (..., n)."""
        weights = out[..., : self.columns].softmax(-1)                           # (..., u)
        columns = out[..., self.columns:].unflatten(-1, (self.columns, self.n))  # (..., u, n), h transposed
        return (weights.unsqueeze(-1) * columns).sum(-2)

    @torch.no_grad()
    def set_output_at_zero(self, value: float) -> None:
        """Shift the columns' biases so that nu = 0 gives `value` everywhere; the response to nu is kept."""
        hidden = F.relu(self.inner.bias)
        at_zero = F.linear(hidden, self.outer.weight)[self.columns:]
        self.outer.bias[self.columns:] = value - at_zero


class Generator(nn.Module):
    """Psi: one context vector nu per task -> the two factors of M for every adapted tensor (Eqs. 6-8, Remark 4).

    Matrices and convolutions get two sister networks. A vector (bias) gets one, M = relu(vector): Eq. 8 with a
    constant row, as in the authors' released code.

    Args:
        shapes: {name: shape} of the adapted tensors, without the task dimension.
        context_dim: D, length of nu (300 on mini-ImageNet, 128 on CelebA).
        columns: u, candidate columns per sister network (5 in the paper).
        factors: how a convolution is viewed as a matrix, see `factor_sizes`.
        init: "identity" starts at M = 1 for nu = 0 (plain MAML); "released" keeps PyTorch's linear initialisation,
            as the authors' released code does in effect; M then starts near zero (about 2e-4 at n = 192, u = 5).
        hidden_cap: largest hidden layer of a sister network.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], context_dim: int = 300, columns: int = 5,
                 factors: str = "flat", init: str = "identity", hidden_cap: int = 256):
        super().__init__()
        if not shapes:
            raise ValueError("the generator needs at least one adapted tensor")
        if init not in ("identity", "released"):
            raise ValueError(f"init must be 'identity' or 'released', got {init!r}")
        for value, what in ((context_dim, "context_dim"), (columns, "columns"), (hidden_cap, "hidden_cap")):
            if value < 1:
                raise ValueError(f"{what} must be at least 1, got {value}")
        self.context_dim = context_dim
        self.shapes = {name: tuple(shape) for name, shape in shapes.items()}
        self.sizes = {name: factor_sizes(shape, factors) for name, shape in shapes.items()}
        self.rows, self.cols = nn.ModuleDict(), nn.ModuleDict()
        for name, (n1, n2) in self.sizes.items():
            if len(shapes[name]) > 1:
                self.rows[_key(name)] = SisterNetwork(context_dim, n1, columns, hidden_cap)
            self.cols[_key(name)] = SisterNetwork(context_dim, n2, columns, hidden_cap)
        if init == "identity":
            for sister in (*self.rows.values(), *self.cols.values()):
                sister.set_output_at_zero(1.0)

    def forward(self, nu: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """nu (T, D) -> {name: (row (T, n1), col (T, n2))}; M = relu(row ⊗ col)."""
        return self._factors(nu, {sister: sister(nu) for sister in self._sisters()})

    def stackable(self) -> bool:
        """Whether `together` computes what a call does: not if forward is a subclass's, a part was exchanged or hooks see calls."""
        parts = list(self.modules())
        return (type(self).forward is Generator.forward and not any(m._forward_hooks or m._forward_pre_hooks for m in parts)
                and all(type(m) in (nn.ModuleDict, SisterNetwork, nn.Linear) for m in parts[1:]))

    def together(self) -> Callable[[Tensor], dict[str, tuple[Tensor, Tensor]]]:
        """`forward` as a function of nu with the present weights, in a fraction of the operations: sister networks of one size
        are computed as one. For a GPU, where they cost more than their arithmetic."""
        groups = {}
        for sister in self._sisters():
            groups.setdefault((sister.n, sister.inner.out_features), []).append(sister)
        stacked = [(sisters, [torch.stack(weights) for weights in zip(*(sister.parameters() for sister in sisters))])
                   for sisters in groups.values()]

        def factors(nu: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
            vectors = {}
            for sisters, (weight, bias, outer_weight, outer_bias) in stacked:
                hidden = F.relu(torch.baddbmm(bias.unsqueeze(1), nu.expand(len(sisters), *nu.shape), weight.mT))    # (S, T, hidden)
                out = torch.baddbmm(outer_bias.unsqueeze(1), hidden, outer_weight.mT)                               # (S, T, u + u n)
                vectors.update(zip(sisters, sisters[0].mix(out)))
            return self._factors(nu, vectors)

        return factors

    def _sisters(self) -> list[SisterNetwork]:
        return [*self.rows.values(), *self.cols.values()]

    def _factors(self, nu: Tensor, vectors: Mapping[SisterNetwork, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        ones = nu.new_ones(len(nu), 1)
        return {name: (vectors[self.rows[_key(name)]] if _key(name) in self.rows else ones, vectors[self.cols[_key(name)]])
                for name in self.sizes}


class LearnedRates(nn.Module):
    """Meta-SGD (Li et al. 2017): a meta-learned rate for every number of the adapted tensors, the same for all tasks.

    Calling it gives {name: (*shape)}, the `alpha` of `adapt`. `shapes` as in `Generator`; all rates start at `rate`.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]], rate: float):
        super().__init__()
        self.rates = nn.ParameterDict({_key(name): torch.full(tuple(shape), float(rate)) for name, shape in shapes.items()})
        self.names = list(shapes)

    def forward(self) -> Tensors:
        return {name: self.rates[_key(name)] for name in self.names}


class Transforms(nn.Module):
    """T-Net (Lee and Choi 2018): behind each adapted layer a linear map of its outputs, T, that is meta-learned and stays as it
    is while the layer is adapted. Every T starts as the identity, where T-Net is MAML.

    `shapes` as in `Generator`; layers are told by their "weight" of two dimensions or more. Called with the adapted tensors
    {name: ([T,] *shape)} it returns those of the same network with each T inside its layer: T W and T b (a bias that is not
    adapted stays behind T).

    Raises ValueError if no weight of a layer is among the shapes.
    """

    def __init__(self, shapes: Mapping[str, Sequence[int]]):
        super().__init__()
        self.dims = {name: len(shape) for name, shape in shapes.items()}
        self.maps = nn.ParameterDict({_key(_layer(name)): torch.eye(shape[0]) for name, shape in shapes.items()
                                      if name.endswith("weight") and len(shape) > 1})
        if not self.maps:
            raise ValueError(f"T-Net maps the outputs of adapted layers, and {', '.join(shapes)} hold no layer's weight")

    def forward(self, tensors: Mapping[str, Tensor]) -> Tensors:
        return {name: self._transformed(name, t) for name, t in tensors.items()}

    def _transformed(self, name: str, t: Tensor) -> Tensor:
        if (layer := _key(_layer(name))) not in self.maps:
            return t
        columns = t.reshape(*t.shape[: t.dim() - self.dims[name] + 1], -1)         # ([T,] out, rest)
        return (self.maps[layer] @ columns).reshape(t.shape)


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def _key(name: str) -> str:
    """A tensor's name as that of a module: without dots, and not that of a method of ModuleDict or ParameterDict, such as "keys"."""
    key = name.replace(".", "/")
    return f"{key}/" if hasattr(nn.ModuleDict, key) or hasattr(nn.ParameterDict, key) else key


# --- the inner loop (Algorithm 1, Eq. 9) -----------------------------------------------------------------------------

def adapt(loss_fn: Callable[[Tensors], Tensor], theta: Mapping[str, Tensor], tasks: int | None,
          alpha: float | Tensor | Mapping[str, Tensor], generator: Generator | None = None, *, steps: int = 1,
          first_order: bool = False, refine: bool = False, noise_std: float = 0.0, rng: torch.Generator | None = None,
          normalise_context: bool = False, differentiable: bool = True, kernel: str = "auto") -> Tensors:
    """Adapt `theta` to every task of a batch at once; a pure function of its arguments.

    Each of the K steps: g = grad L(theta); trial = theta - alpha M(0) ⊙ g; nu = -d L(trial)/d nu;
    theta <- theta - alpha M(nu) ⊙ g. Without a generator M = 1, which is MAML.

    Args:
        loss_fn: {name: (T, *shape)} -> support losses (T,); the loss of task t may depend on slice t only.
        theta: {name: (*shape)}, the tensors to adapt, the same start for all tasks; where `tasks` is None
            {name: (T, *shape)}, a start for each.
        tasks: T, or None.
        alpha: inner learning rate, a number >= 0, or a tensor (one number of any sign), which receives its meta-gradient.
            Without a generator also {name: tensor} with a rate for every number, as in Meta-SGD (`LearnedRates`).
        generator: Psi, a `Generator` or one derived from it, built for theta's names and shapes; or None for MAML.
        steps: K.
        first_order: treat g and nu as constants in the outer derivative.
        refine: the authors' released code for K > 1: g once at theta^0 and 2K passes from there, of which 2K - 1 refine nu and
            the last takes the step. Equal to Algorithm 1 at K = 1.
        noise_std: eta, standard deviation of the Gaussian noise added to g, drawn once per step (Section 5.4).
        rng: source of that noise, on theta's device.
        normalise_context: divide each task's nu by its root mean square, so that what the generator reads does not depend
            on the loss's scale; not in the paper, and needed where gradients are far smaller or larger than a classifier's.
        differentiable: keep the graph for an outer derivative; False saves memory at test time.
        kernel: "auto", "triton", "closed" or "eager", see `kernels.modulated_step`.

    Returns: {name: (T, *shape)} after the last step. Raises ValueError for bad arguments.
    """
    if not theta:
        raise ValueError("no tensor to adapt: theta is empty")
    tasks, given = len(next(iter(theta.values()))) if tasks is None else tasks, tasks
    rates = alpha if isinstance(alpha, Mapping) else dict.fromkeys(theta, alpha)
    if rates.keys() != theta.keys() or isinstance(alpha, Mapping) and generator is not None:
        raise ValueError("alpha with a tensor for each name must name what is adapted, and goes without a generator")
    shapes = {name: tuple(t.shape[given is None:]) for name, t in theta.items()}
    for name, rate in rates.items():
        _check_steps(steps, tasks, rate)
        if isinstance(alpha, Mapping) and isinstance(rate, Tensor) and rate.shape not in ((), shapes[name]):
            raise ValueError(f"alpha's rates for {name} must have its shape {shapes[name]}, got {tuple(rate.shape)}")
    if generator is not None:
        _check_generator(generator, shapes)
    if not 0 <= noise_std < math.inf:
        raise ValueError(f"noise_std must be finite and >= 0, got {noise_std}")
    graph = differentiable and not first_order
    factors = generator
    with torch.enable_grad():
        if generator is not None and next(iter(theta.values())).is_cuda and generator.stackable():
            factors = generator.together()
        current = dict(theta) if given is None else {name: t.expand(tasks, *t.shape) for name, t in theta.items()}
        before = dict(theta)      # current, but without a task dimension where all tasks start alike: a step then reads one theta
        if refine and generator is None:
            raise ValueError("refine is a variant of the context update: it needs a generator")
        if refine and steps:
            gradient = _noisy(_gradient(loss_fn, current, graph), noise_std, rng)
            current = _refined(loss_fn, before, gradient, generator, factors, alpha, steps, graph, kernel, normalise_context)
        for _ in range(0 if refine else steps):
            if not differentiable:
                current, before = ({name: t.detach() for name, t in tensors.items()} for tensors in (current, before))
            gradient = _noisy(_gradient(loss_fn, current, graph), noise_std, rng)
            if generator is None:
                current = {name: t - rates[name] * gradient[name] for name, t in current.items()}
            else:
                trial = lambda nu: loss_fn(_modulated(before, gradient, factors(nu), alpha, kernel))
                nu = _context(trial, _no_context(generator, next(iter(gradient.values()))), graph, normalise_context)
                current = _modulated(before, gradient, factors(nu), alpha, kernel)
            before = current
    return current if differentiable else {name: t.detach() for name, t in current.items()}


def _check_steps(steps, tasks, alpha) -> None:
    if steps < 0 or tasks < 1:
        raise ValueError(f"steps must be >= 0 and tasks >= 1, got steps={steps}, tasks={tasks}")
    if not isinstance(alpha, Tensor) and not (math.isfinite(alpha) and alpha >= 0):
        raise ValueError(f"alpha must be finite and >= 0, got {alpha}")


def _check_generator(generator, shapes: Mapping[str, tuple]) -> None:
    if not isinstance(generator, Generator):
        raise ValueError(f"generator must be a Generator or derived from it, got {type(generator).__name__}")
    if absent := shapes.keys() - generator.shapes.keys():
        raise ValueError(f"the generator was built without {', '.join(sorted(absent))}; it has {', '.join(generator.shapes)}")
    for name, shape in shapes.items():
        if generator.shapes[name] != shape:
            raise ValueError(f"the generator was built for {name} of shape {generator.shapes[name]}, not {shape}")


def _no_context(generator: Generator, like: Tensor) -> Tensor:
    """nu = 0, (T, D), for as many tasks as `like` has."""
    return torch.zeros(len(like), generator.context_dim, device=like.device, dtype=like.dtype)


def _context(trial_loss: Callable[[Tensor], Tensor], nu: Tensor, graph: bool, normalise: bool) -> Tensor:
    """Eq. 9: nu <- minus the gradient, with respect to nu, of the loss after a trial step taken with M(nu)."""
    nu = -_gradient(lambda at: trial_loss(at["nu"]), {"nu": nu}, graph)["nu"]
    return nu * torch.rsqrt(nu.square().mean(1, keepdim=True) + 1e-12) if normalise else nu     # 1e-12: nu may be zero


def _refined(loss_fn, start, gradient, generator, factors, alpha, steps, graph, kernel, normalise) -> Tensors:
    """The released code's K > 1: 2K passes from the same weights and gradient; all but the last replace nu."""
    step = lambda nu: _modulated(start, gradient, factors(nu), alpha, kernel)
    nu = _no_context(generator, next(iter(gradient.values())))
    for _ in range(2 * steps - 1):
        nu = _context(lambda nu: loss_fn(step(nu)), nu, graph, normalise)
    return step(nu)


def _modulated(theta, gradient, factors, alpha, kernel) -> Tensors:
    """{name: theta - alpha relu(row ⊗ col) ⊙ g} for all tensors in one call; theta (*shape) or (T, *shape), g (T, *shape).

    relu lets a number alpha >= 0 ride on the row. A learned one, which may reach 0, where relu passes no gradient, is on g.
    """
    names, on_row = list(theta), 1.0
    if isinstance(alpha, Tensor):
        gradient = {name: alpha * g for name, g in gradient.items()}
    else:
        on_row = alpha
    rows, cols = zip(*(factors[name] for name in names))
    sizes = {name: (row.shape[1], col.shape[1]) for name, row, col in zip(names, rows, cols)}                 # n1, n2
    as_matrix = lambda t, name: t.reshape(*t.shape[: t.dim() - gradient[name].dim() + 1], *sizes[name])       # ([T,] n1, n2)
    stepped = modulated_step([as_matrix(theta[name], name) for name in names],
                             [as_matrix(gradient[name], name) for name in names],
                             [on_row * row for row in rows], list(cols), kernel=kernel)
    return {name: t.reshape(gradient[name].shape) for name, t in zip(names, stepped)}


def _gradient(loss_fn: Callable[[Tensors], Tensor], at: Tensors, graph: bool) -> Tensors:
    """Per-task gradients of loss_fn at `at`; tasks are independent, so the gradient of the sum holds each task's own."""
    if torch.compiler.is_compiling():         # the one form that a compiled function can differentiate once more
        grads = torch.func.grad(lambda at: loss_fn(at).sum())(at)
        return grads if graph else {name: g.detach() for name, g in grads.items()}
    at = {name: t if graph and t.requires_grad else t.detach().requires_grad_() for name, t in at.items()}
    losses = loss_fn(at)
    if losses.shape != (tasks := len(next(iter(at.values()))),):
        raise ValueError(f"loss_fn must return one loss per task, shape ({tasks},), as the tensors' first dimension, got "
                         f"{tuple(losses.shape)}")
    if not losses.requires_grad:
        why = "torch.inference_mode() is on: leave it" if torch.is_inference_mode_enabled() else "it is a constant, or detached"
        raise ValueError(f"the loss does not depend on adapted tensor(s) {', '.join(at)}: {why}")
    grads = torch.autograd.grad(losses.sum(), list(at.values()), create_graph=graph, allow_unused=True)
    unused = [name for name, g in zip(at, grads) if g is None]
    if unused:
        raise ValueError(f"the loss does not depend on adapted tensor(s) {', '.join(unused)}: adapt others")
    return dict(zip(at, grads))


def _noisy(gradient: Tensors, std: float, rng: torch.Generator | None) -> Tensors:
    if std == 0.0:
        return gradient
    draw = lambda g: torch.randn(g.shape, generator=rng, device=g.device, dtype=g.dtype)
    return {name: g + std * draw(g) for name, g in gradient.items()}


# --- the inner loop of one linear layer, for few samples -------------------------------------------------------------

class LinearUpdate(NamedTuple):
    """What the inner loop adds to a linear layer of each task: W + left^T right and b + bias, where R is small."""
    left: Tensor        # (T, R, out)
    right: Tensor       # (T, R, in)
    bias: Tensor        # (T, out)

    def keys(self, x: Tensor) -> Tensor:
        """How much of each row of `left` the inputs x, (T, N, in) or shared (N, in), receive: (T, R, N)."""
        return self.right @ x.mT

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        """From x and z = x W^T + b to the adapted layer's output (T, N, out)."""
        return z + self.keys(x).mT @ self.left + self.bias.unsqueeze(1)


def adapt_linear(loss_fn: Callable[[Tensor], Tensor], x: Tensor, z: Tensor, alpha: float | Tensor, generator: Generator,
                 names: tuple[str, str] = ("weight", "bias"), *, steps: int = 1, first_order: bool = False,
                 normalise_context: bool = False, differentiable: bool = True) -> LinearUpdate:
    """What `adapt` does to the weight W and bias b of one linear layer, without a tensor of W's size for each task.

    The gradient of W from N samples is D^T x with D = d L / d z, and relu(row ⊗ col) is relu(row) ⊗ relu(col) +
    relu(-row) ⊗ relu(-col); so M ⊙ D^T x is (D ⊙ relu(row))^T (x ⊙ relu(col)), plus the same with -row and -col where
    both have negative numbers. K steps give rank R = K N to 2 K N: cheaper than `adapt` while R (in + out) < in out.

    Args:
        loss_fn: the layer's output (T, N, out) -> support losses (T,); the loss of task t may depend on slice t only.
        x: (T, N, in), the layer's support inputs, none of which may depend on what is adapted.
        z: (T, N, out), x W^T + b before adaptation.
        generator: Psi for the two tensors; `names` are theirs in it.
        The others are those of `adapt`.

    Raises ValueError for bad arguments.
    """
    _check_steps(steps, len(x), alpha)
    graph, taken = differentiable and not first_order, []
    weight, bias = names
    _check_generator(generator, {weight: (z.shape[2], x.shape[2]), bias: (z.shape[2],)})
    with torch.enable_grad():
        for _ in range(steps):
            z = taken[-1](z, x) if taken else z
            z, x = z if differentiable else z.detach(), x if graph else x.detach()
            push = -alpha * _gradient(lambda at: loss_fn(at["z"]), {"z": z}, graph)["z"]     # -alpha D, (T, N, out)
            total = push.sum(1)

            def step(nu: Tensor) -> LinearUpdate:
                factors = generator(nu)
                (row, col), scale = factors[weight], factors[bias][1]
                mixed = row.is_cuda or (row < 0).any() & (col < 0).any()                     # a GPU's CPU would wait for the answer
                signed = [(row, col), (-row, -col)] if mixed else [(row, col)]
                left = [push * F.relu(row).unsqueeze(1) for row, _ in signed]
                right = [x * F.relu(col).unsqueeze(1) for _, col in signed]
                return LinearUpdate(_join(left), _join(right), total * F.relu(scale))

            nu = _context(lambda nu: loss_fn(step(nu)(z, x)), _no_context(generator, x), graph, normalise_context)
            taken.append(step(nu))
    if not taken:
        taken = [LinearUpdate(z[:, :0], x[:, :0], torch.zeros_like(z[:, 0]))]
    left, right, biases = zip(*taken)
    update = LinearUpdate(_join(left), _join(right), sum(biases))
    return update if differentiable else LinearUpdate(*(t.detach() for t in update))


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate along R."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


# --- networks as chains of stages ------------------------------------------------------------------------------------

class Stage(NamedTuple):
    """One step of a chain: the parameters it reads and apply(theta, x, support) -> x."""
    reads: tuple[str, ...]
    apply: Callable[[Mapping[str, Tensor], Tensor, int | None], Tensor]


class Chain:
    """A feed-forward network over a batch of tasks, x (T, N, ...) -> (T, N, ...), in which every tensor of theta is
    either shared (*shape) or given per task (T, *shape).

    `support`, if given, makes batch normalisation take its statistics from the first `support` samples of each task
    only (the non-transductive reading); by default all N samples of a task are normalised together.
    """

    def __init__(self, stages: Sequence[Stage]):
        self.stages = tuple(stages)

    def __call__(self, theta: Mapping[str, Tensor], x: Tensor, support: int | None = None) -> Tensor:
        for stage in self.stages:
            x = stage.apply(theta, x, support)
        return x

    def split(self, adapted: Iterable[str]) -> tuple["Chain", "Chain"]:
        """Cut before the first stage that reads an adapted tensor: (prefix, suffix). The prefix does not depend on the
        inner loop, so that its output can be computed once per episode. Raises ValueError for an unknown name."""
        adapted = list(adapted)
        known = [name for stage in self.stages for name in stage.reads]
        check_names(adapted, known)
        first = next(k for k, stage in enumerate(self.stages) if set(stage.reads) & set(adapted))
        return Chain(self.stages[:first]), Chain(self.stages[first:])


def check_names(names: Sequence[str], known: Iterable[str]) -> None:
    """Raise ValueError unless `names` is a non-empty list of distinct members of `known`."""
    known = list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"unknown tensor(s) to adapt: {', '.join(unknown)}; this network has {', '.join(known)}")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"the names of the tensors to adapt must be distinct and at least one, got {list(names)}")


def conv4(ways: int, channels: int = 64, image_size: int = 84, in_channels: int = 3,
          context_dim: int | None = None) -> tuple[Tensors, Chain]:
    """Conv-4: 4 x [conv 3x3 with bias, batch norm, ReLU, max-pool 2], then a linear layer (Vinyals et al. 2016).

    Returns (theta, chain): parameters named conv1.weight, conv1.bias, norm1.weight, norm1.bias, ..., head.weight,
    head.bias with PyTorch's default initialisation, as in the authors' released code (121,093 numbers at 5 ways).

    `context_dim` makes it CAVIA's network (Zintgraf et al. 2019): "context", (context_dim,) zeros, gives each channel a factor and
    an offset through a linear layer, film.weight and film.bias, after the third block's pool and before its ReLU.
    """
    if image_size < 16:
        raise ValueError(f"Conv-4 halves the image four times: image_size must be at least 16, got {image_size}")
    modules, stages = {}, []
    for k in range(1, 5):
        modules[f"conv{k}"] = nn.Conv2d(in_channels if k == 1 else channels, channels, 3, padding=1)
        modules[f"norm{k}"] = nn.BatchNorm2d(channels, track_running_stats=False)
        names = (f"conv{k}.weight", f"conv{k}.bias", f"norm{k}.weight", f"norm{k}.bias")
        stages.append(Stage(names, _reader(_conv_block, names)))
    modules["head"] = nn.Linear(channels * (image_size // 16) ** 2, ways)
    stages.append(Stage(("head.weight", "head.bias"), _reader(_linear, ("head.weight", "head.bias"))))
    if context_dim is None:
        return _parameters(modules), Chain(stages)
    modules["film"] = nn.Linear(context_dim, 2 * channels)
    nn.init.kaiming_uniform_(modules["film"].weight, nonlinearity="linear")
    third, film = stages[2].reads, ("film.weight", "film.bias", "context")
    stages[2:3] = [Stage(third, _reader(functools.partial(_conv_block, relu=False), third)), Stage(film, _reader(_film_relu, film))]
    return _parameters(modules) | {"context": torch.zeros(context_dim)}, Chain(stages)


def resnet34(ways: int, channels: int = 64, image_size: int = 224, in_channels: int = 3) -> tuple[Tensors, Chain]:
    """ResNet-34 (He et al. 2016): a 7x7 convolution, batch norm, ReLU and max-pool 3; 3 + 4 + 6 + 3 blocks of two 3x3
    convolutions with `channels`, 2, 4 and 8 times as many filters, the plane halved with each change; mean over the plane;
    linear layer.

    Returns (theta, chain). Names are torchvision's (conv1.weight, bn1.weight, layer1.0.conv1.weight, ...,
    layer2.0.downsample.0.weight), but for head.weight and head.bias; initialised as there (He et al. 2015, fan-out).
    """
    if image_size < 32:
        raise ValueError(f"ResNet-34 halves the image five times: image_size must be at least 32, got {image_size}")
    stem = {"conv1": _conv_layer(in_channels, channels, 7), "bn1": _norm_layer(channels)}
    parts = [(_resnet_stem, "", stem, 2)]
    width = channels
    for k, count in enumerate((3, 4, 6, 3)):
        for n in range(count):
            out, stride = channels * 2 ** k, 2 if k and not n else 1
            modules = {"conv1": _conv_layer(width, out), "bn1": _norm_layer(out),
                       "conv2": _conv_layer(out, out), "bn2": _norm_layer(out)}
            if stride > 1:
                modules |= {"downsample.0": _conv_layer(width, out, 1), "downsample.1": _norm_layer(out)}
            parts.append((_basic_block, f"layer{k + 1}.{n}.", modules, stride))
            width = out
    return _image_network(parts, nn.Linear(width, ways))


def wide_resnet28(ways: int, channels: int = 160, image_size: int = 80, in_channels: int = 3) -> tuple[Tensors, Chain]:
    """WRN-28 (Zagoruyko and Komodakis 2016), 28-10 at 160 channels: a 3x3 convolution with 16 filters; 3 x 4 blocks of twice
    batch norm, ReLU and a 3x3 convolution, with `channels`, 2 and 4 times as many filters; batch norm, ReLU; mean over the
    plane; linear layer. The plane is halved at each of the three groups, as is usual on mini-ImageNet (on CIFAR at two).

    Returns (theta, chain) with names conv1.weight, layer1.0.bn1.weight, layer1.0.conv1.weight, layer1.0.shortcut.weight,
    ..., bn.weight, head.weight, head.bias; convolutions initialised as in `resnet34`.
    """
    if image_size < 8:
        raise ValueError(f"WRN-28 halves the image three times: image_size must be at least 8, got {image_size}")
    parts = [(lambda layers, x, stride: layers.conv("conv1", x), "", {"conv1": _conv_layer(in_channels, 16)}, 1)]
    width = 16
    for k in range(3):
        for n in range(4):
            out, stride = channels * 2 ** k, 1 if n else 2
            modules = {"bn1": _norm_layer(width), "conv1": _conv_layer(width, out),
                       "bn2": _norm_layer(out), "conv2": _conv_layer(out, out)}
            if n == 0:
                modules["shortcut"] = _conv_layer(width, out, 1)
            parts.append((_preactivated_block, f"layer{k + 1}.{n}.", modules, stride))
            width = out
    parts.append((lambda layers, x, stride: F.relu(layers.norm("bn", x)), "", {"bn": _norm_layer(width)}, 1))
    return _image_network(parts, nn.Linear(width, ways))


def mlp(sizes: Sequence[int]) -> tuple[Tensors, Chain]:
    """A ReLU network of linear layers fc1, fc2, ... with the given widths, input and output included; x (T, N, sizes[0]).

    Returns (theta, chain) with PyTorch's default initialisation.
    """
    if len(sizes) < 2:
        raise ValueError(f"an MLP needs an input and an output width, got {list(sizes)}")
    modules, stages = {}, []
    for k, (n_in, n_out) in enumerate(zip(sizes, sizes[1:]), start=1):
        modules[f"fc{k}"] = nn.Linear(n_in, n_out)
        names = (f"fc{k}.weight", f"fc{k}.bias")
        layer = _linear if k == len(sizes) - 1 else _linear_relu
        stages.append(Stage(names, _reader(layer, names)))
    return _parameters(modules), Chain(stages)


def from_module(module: nn.Module) -> tuple[Tensors, Chain]:
    """Make an `nn.Module` usable here without changing it: (theta, chain) over its own parameters.

    The module must map one task's batch (N, ...) to (N, ...), by operations over which torch.func.vmap can batch the tasks:
    those of nn.LSTM and nn.GRU are not. A plain `nn.Sequential` is cut at its children, so that what lies before the first
    adapted layer is computed once. A parameter that is in several places goes by the first of its names. Batch normalisation
    uses the statistics of each task's batch, never running ones. Buffers and the training mode are those at the time of the
    call: of a module with dropout call `.eval()` before, for an adaptation without it.
    """
    theta = dict(module.named_parameters())
    if not theta:
        raise ValueError(f"{type(module).__name__} has no parameters to adapt")
    names = {id(p): name for name, p in theta.items()}
    plain = type(module) is nn.Sequential and not (module._forward_hooks or module._forward_pre_hooks)
    parts = module if plain else [module]      # of a Sequential: its children, each as often as it is used
    return theta, Chain([_module_stage(part, names) for part in parts])


def _module_stage(module: nn.Module, names: Mapping[int, str]) -> Stage:
    frozen = torch.func.replace_all_batch_norm_modules_(copy.deepcopy(module))
    reads = {name: names[id(p)] for name, p in module.named_parameters()}
    shared = {name: p.dim() for name, p in module.named_parameters()}

    def apply(theta, x, support):
        if support is not None and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in frozen.modules()):
            raise ValueError("statistics from the support set only are not available for a module's own batch norm")
        own = {name: theta[read] for name, read in reads.items()}
        dims = {name: 0 if t.dim() > shared[name] else None for name, t in own.items()}
        call = lambda params, sample: torch.func.functional_call(frozen, params, (sample,))
        return torch.vmap(call, in_dims=(dims, 0), randomness="different")(own, x)

    return Stage(tuple(reads.values()), apply)


def _parameters(modules: Mapping[str, nn.Module]) -> Tensors:
    return {f"{m}.{p}": value for m, module in modules.items() for p, value in module.named_parameters()}


def _reader(layer: Callable[..., Tensor], names: Sequence[str]):
    return lambda theta, x, support: layer(x, *(theta[name] for name in names), support=support)


def _per_task(t: Tensor, tasks: int, dims: int) -> Tensor:
    """(*shape) or (T, *shape) -> (T, *shape), where a shared tensor has `dims` dimensions."""
    return t if t.dim() > dims else t.expand(tasks, *t.shape)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, support: int | None = None) -> Tensor:
    """x (T, N, ...) flattened to (T, N, in); weight (out, in) or (T, out, in) -> (T, N, out)."""
    x = x.flatten(2).to(weight.dtype)
    if weight.dim() == 2 and bias.dim() == 1:
        return linear(x, weight, bias)
    return linear(x, _per_task(weight, len(x), 2), _per_task(bias, len(x), 1))


def _linear_relu(x: Tensor, weight: Tensor, bias: Tensor, support: int | None = None) -> Tensor:
    return F.relu(_linear(x, weight, bias))


def _film_relu(x: Tensor, weight: Tensor, bias: Tensor, context: Tensor, support: int | None = None) -> Tensor:
    """relu(factor x + offset) for each channel of x (T, N, C, H, W); context (D) or (T, D) -> factor, offset (T, C)."""
    factor, offset = _linear(_per_task(context, len(x), 1).unsqueeze(1), weight, bias)[..., None, None].chunk(2, 2)
    return F.relu(factor * x + offset).to(x.dtype)


def _conv_block(x: Tensor, weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor,
                support: int | None = None, relu: bool = True) -> Tensor:
    """conv 3x3, batch norm per task, max-pool 2, ReLU: x (T, N, C, H, W) -> (T, N, C', H/2, W/2).

    The activations keep x's dtype; 16-bit ones meet float32 statistics.
    """
    tasks, weight = len(x), weight.to(x.dtype)
    beta = beta + 0 * bias      # batch norm takes the bias away again: it is in the graph, but nothing is computed for it
    per_task = _per_task(weight, tasks, 4), _per_task(gamma, tasks, 1), _per_task(beta, tasks, 1)
    if _task_by_task(x):
        # Channels-last, task by task: batch norm and max-pool are then vectorised over channels and a task's
        # activations stay in cache; this block takes a small fraction of the time of the grouped form below.
        if relu and support is None and takes_first_block(x[0]):
            blocks = [first_block(*task) for task in zip(x, *per_task)]
        else:
            images = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).split(x.shape[1])
            blocks = [_norm_pool(conv2d(image, w), g, o, support, relu) for image, w, g, o in zip(images, *per_task)]
        return (blocks[0] if tasks == 1 else torch.cat(blocks)).unflatten(0, (tasks, -1))
    if relu and support is None and x.is_cuda and takes_first_block(x):
        return first_blocks(x, *per_task)
    if relu and support is None and takes_blocks(x):
        return task_blocks(x, weight, *per_task[1:])
    return _task_groups(_norm_pool(_task_conv(x.transpose(0, 1).flatten(1, 2), weight, tasks),
                                   gamma=per_task[1].flatten(), beta=per_task[2].flatten(), support=support, relu=relu), tasks)


def _task_by_task(x: Tensor) -> bool:
    """Whether one task after the other is faster than all at once."""
    return x.device.type == "cpu"


def _norm_pool(y: Tensor, gamma: Tensor, beta: Tensor, support: int | None, relu: bool = True) -> Tensor:
    """Batch norm, max-pool 2, ReLU: y (N, C, H, W), gamma and beta (C) -> (N, C, H/2, W/2).

    ReLU after the pool equals ReLU before it and touches a quarter of the numbers.
    """
    if support is None and takes_norm_pool(y):
        return norm_pool(y, gamma, beta, relu)
    pooled = F.max_pool2d(_norm(y, gamma, beta, support), 2)
    return F.relu(pooled) if relu else pooled


def _norm(y: Tensor, gamma: Tensor, beta: Tensor, support: int | None, eps: float = 1e-5) -> Tensor:
    """Batch norm: y (N, C, H, W), gamma and beta (C); statistics come from all N samples or from the first `support`."""
    if support is None:
        return batch_norm(y, gamma, beta, eps)
    var, mean = torch.var_mean(y[:support].to(gamma.dtype), dim=(0, 2, 3), correction=0)      # float32 beside 16-bit activations
    scale = gamma * torch.rsqrt(var + eps)
    return (y * scale[:, None, None] + (beta - mean * scale)[:, None, None]).to(y.dtype)


# Of several tasks at once on a GPU, images are (N, T C, H, W): tasks x channels are adjacent, so that a convolution with
# shared weights, one with weights per task (grouped) and batch norm per task are one launch each, without copies between.

def _task_conv(x: Tensor, weight: Tensor, tasks: int, stride: int = 1) -> Tensor:
    """x (N, T C, H, W), weight (C', C, k, k) or (T, C', C, k, k) -> (N, T C', H / stride, W / stride)."""
    if weight.dim() == 5:
        return conv2d(x, weight.flatten(0, 1), groups=tasks, stride=stride)
    if tasks == 1:
        return conv2d(x, weight, stride=stride)
    y = conv2d(x.unflatten(1, (tasks, -1)).flatten(0, 1), weight, stride=stride)      # (N T, C', H, W)
    return y.unflatten(0, (-1, tasks)).flatten(1, 2)


def _task_groups(y: Tensor, tasks: int) -> Tensor:
    """(N, T C, H, W) -> (T, N, C, H, W), a view."""
    return y.unflatten(1, (tasks, -1)).transpose(0, 1)


class _Layers(NamedTuple):
    """The layers of one stage over images (N, T C, H, W); each of its tensors is shared or, with a first dimension more, per
    task."""
    tensors: Mapping[str, Tensor]
    tasks: int
    support: int | None

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self.tensors

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        return _task_conv(x, self.tensors[f"{name}.weight"].to(x.dtype), self.tasks, stride)

    def norm(self, name: str, x: Tensor) -> Tensor:
        gamma, beta = (_per_task(self.tensors[f"{name}.{kind}"], self.tasks, 1).flatten() for kind in ("weight", "bias"))
        return _norm(x, gamma, beta, self.support).to(x.dtype)


def _resnet_stem(layers: _Layers, x: Tensor, stride: int) -> Tensor:
    return F.max_pool2d(F.relu(layers.norm("bn1", layers.conv("conv1", x, stride))), 3, 2, padding=1)


def _basic_block(layers: _Layers, x: Tensor, stride: int) -> Tensor:
    """ReLU(shortcut + norm(conv(ReLU(norm(conv)))))."""
    y = F.relu(layers.norm("bn1", layers.conv("conv1", x, stride)))
    y = layers.norm("bn2", layers.conv("conv2", y))
    if layers.has("downsample.0"):
        x = layers.norm("downsample.1", layers.conv("downsample.0", x, stride))
    return F.relu(x + y)


def _preactivated_block(layers: _Layers, x: Tensor, stride: int) -> Tensor:
    """shortcut + conv(ReLU(norm(conv(ReLU(norm))))); a convolved shortcut starts after the first ReLU, as in the authors'
    network."""
    y = F.relu(layers.norm("bn1", x))
    if layers.has("shortcut"):
        x = layers.conv("shortcut", y, stride)
    return x + layers.conv("conv2", F.relu(layers.norm("bn2", layers.conv("conv1", y, stride))))


def _conv_layer(n_in: int, n_out: int, size: int = 3) -> nn.Conv2d:
    conv = nn.Conv2d(n_in, n_out, size, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _norm_layer(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, track_running_stats=False)


def _image_network(parts, head: nn.Linear) -> tuple[Tensors, Chain]:
    """Stages of (block(layers, x, stride), prefix of its names, its modules, stride), then a mean over the plane and the head."""
    modules = {prefix + name: module for _, prefix, own, _ in parts for name, module in own.items()} | {"head": head}
    stages = [_image_stage(functools.partial(block, stride=stride), prefix, own) for block, prefix, own, stride in parts]
    stages.append(Stage((), lambda theta, x, support: x.mean((3, 4))))
    stages.append(Stage(("head.weight", "head.bias"), _reader(_linear, ("head.weight", "head.bias"))))
    return _parameters(modules), Chain(stages)


def _image_stage(block: Callable[[_Layers, Tensor], Tensor], prefix: str, modules: Mapping[str, nn.Module]) -> Stage:
    dims = {name: t.dim() for name, t in _parameters(modules).items()}

    def apply(theta, x, support):
        tasks, own = len(x), {name: theta[prefix + name] for name in dims}
        if not _task_by_task(x):
            return _task_groups(block(_Layers(own, tasks, support), x.transpose(0, 1).flatten(1, 2)), tasks)
        images = x.flatten(0, 1).contiguous(memory_format=torch.channels_last).split(x.shape[1])       # as in _conv_block
        each = [t.unbind() if t.dim() > dims[name] else [t] * tasks for name, t in own.items()]
        out = [block(_Layers(dict(zip(own, ts)), 1, support), y) for y, *ts in zip(images, *each)]
        return (out[0] if tasks == 1 else torch.cat(out)).unflatten(0, (tasks, -1))

    return Stage(tuple(prefix + name for name in dims), apply)
