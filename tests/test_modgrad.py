"""The batched core against the naive oracle, finite differences and what the equations promise."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import modgrad
import naive
from modgrad import Generator, LearnedRates, Transforms, adapt, adapt_linear, conv4, factor_sizes, from_module, mlp

ADAPTED = ["conv3.weight", "conv3.bias", "conv4.weight", "conv4.bias"]
TASKS, SUPPORT, QUERY, WAYS, DIM, U = 3, 6, 8, 3, 7, 4
# Both sides sum the same products in another order; float64 leaves 1e-10 with room for the eight layers and two
# derivatives between, float32 is held to 1e-5 of the largest entry.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def episode(dtype, seed=0, size=16):
    g = torch.Generator().manual_seed(seed)
    x = lambda n: torch.randn(TASKS, n, 3, size, size, generator=g, dtype=torch.float64).to(dtype)
    y = lambda n: torch.randint(WAYS, (TASKS, n), generator=g)
    return x(SUPPORT), y(SUPPORT), x(QUERY), y(QUERY)


def network(dtype, adapted=ADAPTED, init="identity", factors="flat", seed=0):
    """A small Conv-4 and its generator; the generator's weights are enlarged so that M differs between tasks."""
    torch.manual_seed(seed)
    theta, chain = conv4(WAYS, channels=4, image_size=16)
    theta = {name: t.detach().to(dtype).requires_grad_() for name, t in theta.items()}
    psi = Generator({n: theta[n].shape for n in adapted}, DIM, U, factors, init).to(dtype)
    with torch.no_grad():
        for name, p in psi.named_parameters():
            p.mul_(2.0 if "outer" in name else 1.0)
    return theta, chain, psi


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def batched(theta, chain, psi, data, adapted, alpha=0.3, **options):
    """Adapted tensors and meta-loss by modgrad.py, through the split network."""
    support_x, support_y, query_x, query_y = data
    prefix, suffix = chain.split(adapted)
    h = prefix(theta, support_x)
    loss = lambda p: cross_entropy(suffix({**theta, **p}, h), support_y)
    out = adapt(loss, {n: theta[n] for n in adapted}, TASKS, alpha, psi, **options)
    return out, cross_entropy(suffix({**theta, **out}, prefix(theta, query_x)), query_y).sum()


def oracle(theta, psi, data, adapted, noise=None, **options):
    """The same by tests/naive.py."""
    weights = dict(psi.named_parameters()) if psi else None
    outs, total = [], 0
    for t in range(TASKS):
        support_x, support_y, query_x, query_y = (part[t] for part in data)
        loss = lambda p: F.cross_entropy(naive.conv4_logits(p, support_x), support_y)
        own = [{n: e[t] for n, e in step.items()} for step in noise] if noise else None
        out = naive.adapt_one(loss, theta, adapted, weights, 0.3, context_dim=DIM, u=U, noise=own, **options)
        outs.append(out)
        total = total + F.cross_entropy(naive.conv4_logits(out, query_x), query_y)
    return {n: torch.stack([out[n] for out in outs]) for n in adapted}, total


def meta_gradients(loss, theta, psi):
    named = {**theta, **({f"psi.{n}": p for n, p in psi.named_parameters()} if psi else {})}
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads)}


def vanishes(name):
    """A convolution's bias has no effect behind batch norm; its gradients are rounding noise."""
    return "conv" in name and "bias" in name.split("inner")[0].split("outer")[0]


def assert_close(actual, expected, tolerance, scale=None):
    """Entry by entry, relative to the largest entry of the tensor; for tensors that vanish, of all tensors."""
    assert actual.keys() == expected.keys()
    largest = max(t.abs().max().item() for t in expected.values())
    for name in expected:
        size = max(largest if vanishes(name) else expected[name].abs().max().item(), scale or 0)
        error = (actual[name] - expected[name]).abs().max().item()
        assert error <= tolerance * size, f"{name}: error {error:.2e} of {size:.2e}"


def compare(dtype, adapted=ADAPTED, psi=True, init="identity", factors="flat", kernel="eager", **options):
    theta, chain, generator = network(dtype, adapted, init, factors)
    generator = generator if psi else None
    data = episode(dtype)
    ours, our_loss = batched(theta, chain, generator, data, adapted, kernel=kernel, **options)
    theirs, their_loss = oracle(theta, generator, data, adapted, **options)
    assert_close(ours, theirs, TOLERANCE[dtype])
    ours, theirs = (meta_gradients(loss, theta, generator) for loss in (our_loss, their_loss))
    quiet = [n for n, g in theirs.items() if not vanishes(n) and g.abs().max() < 1e-8]
    assert not quiet, f"vacuous comparison: no meta-gradient reaches {quiet}"
    for part in ("psi.", ""):
        pick = lambda grads: {n: g for n, g in grads.items() if n.startswith("psi.") == bool(part)}
        if psi or not part:
            assert_close(pick(ours), pick(theirs), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("kernel", ["eager", "closed"])
def test_modgrad_equals_naive(dtype, steps, kernel, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.modulate"], "CLOSED_FROM", 1)      # no tensor is too small for the closed forms
    compare(dtype, steps=steps, kernel=kernel)


@pytest.mark.parametrize("options", [
    {"init": "released"}, {"factors": "natural"}, {"refine": True, "steps": 2}, {"refine": True, "steps": 1},
    {"normalise_context": True, "steps": 2}, {"normalise_context": True, "refine": True, "steps": 2},
    {"first_order": True, "steps": 2}, {"adapted": ["conv1.weight", "norm2.weight", "head.weight", "head.bias"]},
], ids=str)
def test_variants_equal_naive(options):
    compare(torch.float64, **options)


def test_a_normalised_context_does_not_depend_on_the_scale_of_the_loss():
    theta, chain, generator = network(torch.float64)
    support_x, support_y = episode(torch.float64)[:2]
    prefix, suffix = chain.split(ADAPTED)
    features = prefix(theta, support_x)

    def adapted(scale, normalise):
        loss = lambda part: scale * cross_entropy(suffix({**theta, **part}, features), support_y)
        return adapt(loss, {n: theta[n] for n in ADAPTED}, TASKS, 0.3 / scale, generator, normalise_context=normalise)

    assert_close(adapted(10.0, True), adapted(1.0, True), 1e-6)         # 1e-12 beside nu's mean square
    with pytest.raises(AssertionError):
        assert_close(adapted(10.0, False), adapted(1.0, False), 1e-6)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("first_order", [False, True])
def test_maml_equals_naive(steps, first_order):
    everything = list(network(torch.float64)[0])
    compare(torch.float64, everything, psi=False, steps=steps, first_order=first_order)


@pytest.mark.parametrize("steps, first_order", [(1, False), (3, False), (2, True)])
def test_meta_sgd_equals_its_equation(steps, first_order):
    """theta - alpha * g with a rate for every number, one task at a time; the rates' meta-gradients too."""
    theta, chain, _ = network(torch.float64)
    names = ["conv1.weight", "norm3.bias", "head.weight"]
    data = support_x, support_y, query_x, query_y = episode(torch.float64)
    rates = LearnedRates({n: theta[n].shape for n in names}, 0.2).double()
    with torch.no_grad():
        for p in rates.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype))
    prefix, suffix = chain.split(names)
    features = prefix(theta, support_x)
    loss = lambda p: cross_entropy(suffix({**theta, **p}, features), support_y)
    ours = adapt(loss, {n: theta[n] for n in names}, TASKS, rates(), steps=steps, first_order=first_order)
    our_loss = cross_entropy(suffix({**theta, **ours}, prefix(theta, query_x)), query_y).sum()
    their_loss = 0
    for t in range(TASKS):
        current = dict(theta)
        for _ in range(steps):
            inner = lambda p: F.cross_entropy(naive.conv4_logits(p, support_x[t]), support_y[t])
            g = naive.gradient(inner, current, names, None)
            current |= {n: current[n] - rates()[n] * (g[n].detach() if first_order else g[n]) for n in names}
        assert_close({n: ours[n][t] for n in names}, {n: current[n] for n in names}, 1e-10)
        their_loss = their_loss + F.cross_entropy(naive.conv4_logits(current, query_x[t]), query_y[t])
    ours, theirs = (meta_gradients(value, theta, rates) for value in (our_loss, their_loss))
    assert min(g.abs().max() for n, g in theirs.items() if n.startswith("psi.")) > 1e-6
    assert_close(ours, theirs, 1e-10)


def test_t_net_without_a_layers_weight_is_refused():
    with pytest.raises(ValueError, match="conv4.bias, norm4.weight hold no layer's weight"):
        Transforms({"conv4.bias": (8,), "norm4.weight": (8,)})


@pytest.mark.parametrize("steps, first_order", [(1, False), (3, False), (2, True)])
def test_t_net_equals_its_definition(steps, first_order):
    """Linear maps right behind the adapted layers, which only the outer derivative changes; biases and batch norm too."""
    theta, chain, _ = network(torch.float64)
    names = ["conv3.weight", "conv3.bias", "norm3.weight", "conv4.weight", "head.weight", "head.bias"]
    support_x, support_y, query_x, query_y = episode(torch.float64)
    transforms = Transforms({n: theta[n].shape for n in names}).double()
    tensors = {n: theta[n] for n in names}
    assert all(torch.equal(t, theta[n]) for n, t in transforms(tensors).items())       # the identity at the start
    with torch.no_grad():
        for p in transforms.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(2), dtype=p.dtype))
    maps = {name.removeprefix("maps."): p for name, p in transforms.named_parameters()}
    assert set(maps) == {"conv3", "conv4", "head"}
    prefix, suffix = chain.split(names)
    features = prefix(theta, support_x)
    loss = lambda p: cross_entropy(suffix({**theta, **transforms(p)}, features), support_y)
    ours = adapt(loss, tensors, TASKS, 0.2, steps=steps, first_order=first_order)
    our_loss = cross_entropy(suffix({**theta, **transforms(ours)}, prefix(theta, query_x)), query_y).sum()
    their_loss = 0
    for t in range(TASKS):
        inner = lambda p: F.cross_entropy(naive.conv4_logits(p, support_x[t], maps), support_y[t])
        current = naive.adapt_one(inner, theta, names, None, 0.2, DIM, U, steps, first_order)
        assert_close({n: ours[n][t] for n in names}, {n: current[n] for n in names}, 1e-10)
        their_loss = their_loss + F.cross_entropy(naive.conv4_logits(current, query_x[t], maps), query_y[t])
    ours, theirs = (meta_gradients(value, theta, transforms) for value in (our_loss, their_loss))
    assert min(g.abs().max() for n, g in theirs.items() if n.startswith("psi.")) > 1e-6
    assert_close(ours, theirs, 1e-10)


def test_modulation_of_one_is_maml():
    """With the identity initialisation and sisters that ignore nu, M = 1 and ModGrad is MAML."""
    theta, chain, psi = network(torch.float64)
    with torch.no_grad():
        for sister in (*psi.rows.values(), *psi.cols.values()):
            sister.outer.weight.zero_()
            sister.set_output_at_zero(1.0)
    data = episode(torch.float64)
    ours, our_loss = batched(theta, chain, psi, data, ADAPTED, steps=2)
    maml, maml_loss = batched(theta, chain, None, data, ADAPTED, steps=2)
    assert_close(ours, maml, 1e-12)
    assert_close(meta_gradients(our_loss, theta, None), meta_gradients(maml_loss, theta, None), 1e-10, scale=1e-3)


def test_refine_keeps_no_graph_that_is_not_wanted_and_takes_no_step_at_none():
    theta, chain, psi = network(torch.float64)
    x, y, *_ = episode(torch.float64)
    start = {n: theta[n] for n in ADAPTED}
    loss = lambda adapted: cross_entropy(chain({**theta, **adapted}, x), y)
    fixed = adapt(loss, start, TASKS, 0.3, psi, steps=2, refine=True, differentiable=False)
    free = adapt(loss, start, TASKS, 0.3, psi, steps=2, refine=True)
    assert not any(t.requires_grad for t in fixed.values()) and all(t.requires_grad for t in free.values())
    assert all(torch.equal(fixed[n], free[n]) for n in ADAPTED)
    nothing = adapt(loss, start, TASKS, 0.3, psi, steps=0, refine=True)
    assert all(torch.equal(nothing[n], start[n].expand_as(nothing[n])) for n in ADAPTED)


def test_refine_is_algorithm_1_at_one_step():
    theta, chain, psi = network(torch.float64)
    data = episode(torch.float64)
    assert_close(batched(theta, chain, psi, data, ADAPTED, refine=True)[0],
                 batched(theta, chain, psi, data, ADAPTED)[0], 1e-14)


@pytest.mark.parametrize("steps", [1, 2])
def test_meta_gradient_by_finite_differences(steps):
    """Central differences of the meta-loss along random directions in theta and in psi."""
    theta, chain, psi = network(torch.float64)
    data = episode(torch.float64)
    grads = meta_gradients(batched(theta, chain, psi, data, ADAPTED, steps=steps)[1], theta, psi)
    tensors = {**theta, **{f"psi.{n}": p for n, p in psi.named_parameters()}}
    for part in ("psi.", "conv1", "conv3", "head"):
        chosen = {n: p for n, p in tensors.items() if n.startswith(part)}
        torch.manual_seed(1)
        direction = {n: torch.randn_like(p) for n, p in chosen.items()}
        h, values = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                for n, p in chosen.items():
                    p.add_(direction[n], alpha=sign * h)
            values.append(batched(theta, chain, psi, data, ADAPTED, steps=steps)[1].item())
            with torch.no_grad():
                for n, p in chosen.items():
                    p.add_(direction[n], alpha=-sign * h)
        slope = sum((grads[n] * direction[n]).sum().item() for n in chosen)
        assert abs(slope) > 1e-4, f"no slope along {part}: the check says nothing"
        # h = 1e-6: rounding of the loss (1e-16 / h) and curvature (h^2) both stay below 1e-8; ReLU kinks allow 1e-5.
        assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("at", [0.3, 0.0, -0.2])
def test_a_learned_alpha_gets_its_gradient_at_zero_and_below_too(at):
    theta, chain, psi = network(torch.float64)
    data = episode(torch.float64)
    loss = lambda alpha: batched(theta, chain, psi, data, ADAPTED, torch.tensor(alpha, dtype=torch.float64), steps=2)[1].item()
    alpha = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    value = batched(theta, chain, psi, data, ADAPTED, alpha, steps=2)[1]
    slope, = torch.autograd.grad(value, alpha)
    if at >= 0:
        assert value.item() == pytest.approx(batched(theta, chain, psi, data, ADAPTED, at, steps=2)[1].item(), rel=1e-12)
    # rounding of the loss (1e-16 / h) and curvature (h^2) both stay below 1e-8; ReLU kinks allow 1e-5
    assert abs(slope) > 1e-4 and (loss(at + 1e-6) - loss(at - 1e-6)) / 2e-6 == pytest.approx(slope.item(), rel=1e-5)


def test_first_order_differs_from_second_order():
    theta, chain, psi = network(torch.float64)
    data = episode(torch.float64)
    second, first = (meta_gradients(batched(theta, chain, psi, data, ADAPTED, first_order=flag)[1], theta, psi)
                     for flag in (False, True))
    assert (second["conv3.weight"] - first["conv3.weight"]).abs().max() > 1e-4


def test_noise_enters_the_raw_gradient_once_per_step():
    theta, chain, psi = network(torch.float64)
    data = episode(torch.float64)
    rng = torch.Generator().manual_seed(5)
    ours, _ = batched(theta, chain, psi, data, ADAPTED, steps=2, noise_std=0.1, rng=rng)
    rng.manual_seed(5)
    draw = lambda: {n: 0.1 * torch.randn(TASKS, *theta[n].shape, generator=rng, dtype=torch.float64) for n in ADAPTED}
    theirs, _ = oracle(theta, psi, data, ADAPTED, noise=[draw(), draw()], steps=2)
    assert_close(ours, theirs, 1e-10)


def test_adapting_without_a_graph_gives_the_same_weights():
    theta, chain, psi = network(torch.float64)
    data = episode(torch.float64)
    kept, _ = batched(theta, chain, psi, data, ADAPTED, steps=2)
    bare, _ = batched(theta, chain, psi, data, ADAPTED, steps=2, differentiable=False)
    assert_close(bare, kept, 1e-12)
    assert not any(t.requires_grad for t in bare.values())


def test_tasks_do_not_influence_each_other():
    theta, chain, psi = network(torch.float64)
    data = episode(torch.float64)
    before, _ = batched(theta, chain, psi, data, ADAPTED)
    changed = [part.clone() for part in data]
    changed[0][1] += 1.0
    after, _ = batched(theta, chain, psi, changed, ADAPTED)
    same = [all(torch.equal(before[n][t], after[n][t]) for n in ADAPTED) for t in range(TASKS)]
    assert same == [True, False, True]


@pytest.mark.parametrize("options, shared", [({"steps": 2}, [True, True, False, False]), ({"steps": 2, "refine": True}, [True] * 4),
                                             ({"steps": 2, "differentiable": False}, [True, True, False, False])], ids=str)
def test_theta_is_one_for_all_tasks_until_they_have_moved(options, shared, monkeypatch):
    """What the kernels read once, of the trials and the steps; no copy for each task is made of it."""
    seen, step = [], modgrad.modulated_step
    monkeypatch.setattr(modgrad, "modulated_step", lambda thetas, *rest, **flags: seen.append(
        {theta.dim() == 2 for theta in thetas}) or step(thetas, *rest, **flags))
    theta, chain, psi = network(torch.float64)
    batched(theta, chain, psi, episode(torch.float64), ADAPTED, **options)
    assert seen == [{one} for one in shared]


def test_on_a_gpu_too_a_hook_sees_each_call_of_the_generator(monkeypatch):
    """There the sister networks are computed together, without `forward`, unless somebody watches it."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    theta, target = {"w": torch.ones(3, 4)}, torch.arange(12.0).view(3, 4)
    psi, seen = Generator({"w": (3, 4)}, context_dim=6), []
    loss = lambda adapted: (adapted["w"] - target).square().sum((-2, -1)).expand(2)
    alone = adapt(loss, theta, 2, 0.1, psi, kernel="closed")
    psi.register_forward_hook(lambda module, inputs, factors: seen.append(inputs[0]))
    watched = adapt(loss, theta, 2, 0.1, psi, kernel="closed")
    assert len(seen) == 2 and not seen[0].any() and seen[1].any()                   # nu = 0, and the nu of Eq. 9
    assert_close(watched, alone, 1e-6)


@pytest.mark.parametrize("differentiable", [True, False])
def test_each_task_may_start_elsewhere(differentiable):
    """Two calls of one step, the second from where each task is, are one call of two steps."""
    theta, chain, psi = network(torch.float64)
    support_x, support_y, *_ = episode(torch.float64)
    loss = lambda adapted: cross_entropy(chain({**theta, **adapted}, support_x), support_y)
    start = {name: theta[name] for name in ADAPTED}
    once = adapt(loss, start, TASKS, 0.3, psi, steps=2, differentiable=differentiable)
    first = adapt(loss, start, TASKS, 0.3, psi, differentiable=differentiable)
    assert_close(adapt(loss, first, None, 0.3, psi, differentiable=differentiable), once, 1e-12)


def test_support_statistics_are_not_transductive():
    """With statistics from the support set a query's output does not depend on the other queries."""
    theta, chain, _ = network(torch.float64)
    support_x, _, query_x, _ = episode(torch.float64)
    alone = chain(theta, torch.cat([support_x, query_x[:, :1]], 1), SUPPORT)[:, SUPPORT:]
    together = chain(theta, torch.cat([support_x, query_x], 1), SUPPORT)[:, SUPPORT:]
    assert torch.allclose(alone[:, 0], together[:, 0], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(chain(theta, query_x)[:, 0], together[:, 0], rtol=1e-3)


# --- one linear layer, for few samples ---

def two_layers(options, outer=True, mixed=True):
    """adapt and adapt_linear on the first of two layers, float64: two lists of (output on queries, meta-gradients)."""
    torch.manual_seed(0)
    theta, chain = mlp([6, 5, 2])
    theta = {name: t.detach().double().requires_grad_() for name, t in theta.items()}
    names = ("fc1.weight", "fc1.bias")
    psi = Generator({name: theta[name].shape for name in names}, DIM, U).double()
    if mixed:                           # rows and columns of both signs, and M's dead entries
        with torch.no_grad():
            for p in psi.parameters():
                p.normal_()
    x, y, queries = (torch.randn(size).double() for size in ((TASKS, 4, 6), (TASKS, 4, 2), (9, 6)))
    x.requires_grad_()
    tail = lambda z: F.linear(F.relu(z), theta["fc2.weight"], theta["fc2.bias"])
    loss = lambda out: (out - y).square().mean((1, 2))
    adapted = adapt(lambda p: loss(chain({**theta, **p}, x)), {n: theta[n] for n in names}, TASKS, 0.3, psi, **options)
    expected = chain({**theta, **adapted}, queries.expand(TASKS, -1, -1))
    z = lambda x: F.linear(x, *(theta[name] for name in names))
    update = adapt_linear(lambda z: loss(tail(z)), x, z(x), 0.3, psi, names, **options)
    result, weights = [], [*theta.values(), *psi.parameters(), x]
    for out in (expected, tail(update(z(queries), queries))):
        grads = torch.autograd.grad(out.square().sum(), weights, materialize_grads=True) if outer else ()
        result.append([out, *grads])
    return *result, update


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("options", [{}, {"steps": 3}, {"steps": 2, "first_order": True},
                                     {"steps": 2, "normalise_context": True}, {"steps": 0}], ids=str)
def test_one_linear_layer_is_adapted_the_same_without_its_weights(options, mixed):
    """Outputs and every meta-gradient, that of the inputs included."""
    if options.get("steps") == 0:
        options = {**options, "differentiable": False}
    expected, ours, update = two_layers(options, outer=options.get("steps") != 0, mixed=mixed)
    scale = max(t.abs().max() for t in expected)
    assert all((a - b).abs().max() < 1e-11 * scale for a, b in zip(expected, ours))
    assert update.left.shape[1] in ([4 * options.get("steps", 1)] if not mixed else
                                    [4 * k for k in range(options.get("steps", 1), 2 * options.get("steps", 1) + 1)])


def test_signs_of_both_factors_count_where_both_have_negative_numbers():
    """Without the second product the update differs: the case above would not notice if no sign were mixed."""
    assert two_layers({})[2].left.shape[1] == 8
    with pytest.raises(ValueError, match="alpha must be finite"):
        adapt_linear(None, torch.zeros(1, 1, 1), torch.zeros(1, 1, 1), -1.0, None)


# --- the generator ---

def test_generator_has_the_authors_size():
    theta, _ = conv4(5)
    sizes = {u: sum(p.numel() for p in Generator({n: theta[n].shape for n in ADAPTED}, 300, u).parameters())
             for u in (1, 5, 10)}
    assert sizes == {1: 427_142, 5: 1_056_926, 10: 1_844_156}
    assert sum(t.numel() for t in theta.values()) == 121_093


def test_identity_initialisation_starts_at_one_and_still_listens_to_nu():
    psi = Generator({"conv.weight": (4, 3, 3, 3), "conv.bias": (4,)}, DIM, U, init="identity").double()
    nu = torch.zeros(2, DIM, dtype=torch.float64, requires_grad=True)
    for row, col in psi(nu).values():
        m = torch.relu(row[:, :, None] * col[:, None, :])
        assert torch.allclose(m, torch.ones_like(m), atol=1e-6)      # shifted in float32 before .double()
        assert torch.autograd.grad(m.square().sum(), nu, retain_graph=True)[0].abs().max() > 1e-4


def test_released_initialisation_starts_near_zero():
    torch.manual_seed(0)
    psi = Generator({"conv3.weight": (64, 64, 3, 3)}, 300, 5, init="released")
    row, col = psi(torch.zeros(1, 300))["conv3.weight"]
    m = torch.relu(row[0, :, None] * col[0])
    # protocols of the released code: half the entries are zero, the others about 2.4e-4 on average
    assert 0.4 < (m == 0).float().mean() < 0.6
    assert 1e-4 < m[m > 0].mean() < 5e-4


def test_tensors_may_be_named_as_a_dictionarys_methods():
    shapes = {"keys": (4, 3), "pop.values": (5,), "update": (2, 2)}
    factors = Generator(shapes, 8)(torch.zeros(2, 8))
    assert {name: (row.shape[1], col.shape[1]) for name, (row, col) in factors.items()} == {
        "keys": (4, 3), "pop.values": (1, 5), "update": (2, 2)}
    rates = LearnedRates(shapes, 1)()
    assert {name: tuple(t.shape) for name, t in rates.items()} == shapes and rates["keys"].dtype == torch.float32


def test_factor_sizes():
    assert factor_sizes((64, 64, 3, 3)) == (192, 192)
    assert factor_sizes((64, 32, 3, 3), "natural") == (64, 288)
    assert factor_sizes((5, 1600)) == (5, 1600)
    assert factor_sizes((64,)) == (1, 64)


# --- the reader's own network ---

class OwnNetwork(nn.Module):
    """Not a Sequential, with running statistics: what a reader may bring."""

    def __init__(self):
        super().__init__()
        self.net = own_module()

    def forward(self, x):
        return self.net(x)


def own_module():
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
                         nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, WAYS)).double()


def without_running_statistics(module):
    module = copy.deepcopy(module)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean = m.running_var = None
    return module


@pytest.mark.parametrize("build, prefix_stages", [(own_module, 5), (OwnNetwork, 0)])
def test_any_module_is_adapted_by_name_and_left_unchanged(build, prefix_stages):
    module = build()
    before = copy.deepcopy(module.state_dict())
    names = [n for n, _ in module.named_parameters() if n.endswith(("5.weight", "5.bias"))]
    theta, chain = from_module(module)
    prefix, suffix = chain.split(names)
    assert len(prefix.stages) == prefix_stages
    psi = Generator({n: theta[n].shape for n in names}, DIM, U).double()
    data = support_x, support_y, query_x, query_y = episode(torch.float64)
    _, loss = batched(theta, chain, psi, data, names)
    plain, reference = without_running_statistics(module), 0
    for t in range(TASKS):
        inner = lambda p: F.cross_entropy(torch.func.functional_call(plain, p, (support_x[t],)), support_y[t])
        out = naive.adapt_one(inner, dict(theta), names, dict(psi.named_parameters()), 0.3, DIM, U)
        reference = reference + F.cross_entropy(torch.func.functional_call(plain, out, (query_x[t],)), query_y[t])
    ours, theirs = (meta_gradients(value, theta, psi) for value in (loss, reference))
    assert min(theirs[n].abs().max() for n in ("psi.rows." + names[0].replace(".", "/") + ".inner.weight", names[0])) > 1e-6
    assert_close(ours, theirs, 1e-9, scale=1e-3)      # the first convolution's bias vanishes behind batch norm
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


class PlusOne(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


def twice_the_same():
    layer, activation = nn.Linear(4, 4), nn.Tanh()
    return nn.Sequential(layer, activation, layer, activation, nn.Linear(4, 3))


def tied_children():
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    module[2].weight = module[0].weight
    return module


def hooked():
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
    module.register_forward_hook(lambda module, args, out: out * 2)
    return module


@pytest.mark.parametrize("build, stages", [(twice_the_same, 5), (tied_children, 4), (hooked, 1),
                                           (lambda: PlusOne(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)), 1)])
def test_a_modules_chain_computes_what_the_module_does(build, stages):
    torch.manual_seed(0)
    module = build().double()
    theta, chain = from_module(module)
    x = torch.rand(TASKS, 5, 4, dtype=torch.float64)
    assert len(chain.stages) == stages and torch.allclose(chain(theta, x), module(x), rtol=0, atol=1e-14)
    per_task = {**theta, "0.weight": torch.stack([theta["0.weight"] * (t + 1) for t in range(TASKS)])}
    for t in range(TASKS):
        own = {**theta, "0.weight": per_task["0.weight"][t]}
        assert torch.allclose(chain(per_task, x)[t], torch.func.functional_call(module, own, (x[t],)), rtol=0, atol=1e-14)
    prefix, _ = chain.split(["0.weight"])
    assert not prefix.stages


def test_mlp_regression_equals_naive():
    torch.manual_seed(0)
    theta, chain = mlp([2, 6, 6, 3])
    theta = {n: t.detach().double().requires_grad_() for n, t in theta.items()}
    names = ["fc2.weight", "fc2.bias"]
    psi = Generator({n: theta[n].shape for n in names}, DIM, U).double()
    x, y = torch.rand(TASKS, 5, 2, dtype=torch.float64), torch.rand(TASKS, 5, 3, dtype=torch.float64)
    prefix, suffix = chain.split(names)
    mse = lambda p: (suffix({**theta, **p}, prefix(theta, x)) - y).square().mean((1, 2))
    ours = adapt(mse, {n: theta[n] for n in names}, TASKS, 0.3, psi, steps=2)
    for t in range(TASKS):
        loss = lambda p: (naive.mlp_output(p, x[t]) - y[t]).square().mean()
        theirs = naive.adapt_one(loss, theta, names, dict(psi.named_parameters()), 0.3, DIM, U, steps=2)
        assert_close({n: ours[n][t] for n in names}, {n: theirs[n] for n in names}, 1e-10)


# --- errors ---

@pytest.mark.parametrize("call, message", [
    (lambda t, c, p, l: c.split(["conv9.weight"]), "conv9.weight.*conv1.weight"),
    (lambda t, c, p, l: c.split([]), "at least one"),
    (lambda t, c, p, l: c.split(["head.bias", "head.bias"]), "distinct"),
    (lambda t, c, p, l: adapt(l, {}, 2, 0.1), "empty"),
    (lambda t, c, p, l: adapt(l, t, 2, {"conv1.weight": t["conv1.weight"]}), "must name what is adapted"),
    (lambda t, c, p, l: adapt(l, t, 2, t, p), "without a generator"),
    (lambda t, c, p, l: adapt(l, t, 2, -0.1), "alpha"),
    (lambda t, c, p, l: adapt(l, t, 2, float("nan")), "alpha"),
    (lambda t, c, p, l: adapt(l, t, 0, 0.1), "tasks=0"),
    (lambda t, c, p, l: adapt(l, t, 2, 0.1, noise_std=-1), "noise_std"),
    (lambda t, c, p, l: adapt(l, t, 2, 0.1, refine=True), "generator"),
    (lambda t, c, p, l: adapt(l, t, 2, 0.1, Generator({"conv1.weight": (4, 3, 3, 3)})), "built without .*head.weight.*has conv1.weight"),
    (lambda t, c, p, l: adapt(l, {"w": torch.zeros(6, 4)}, 2, 0.1, Generator({"w": (4, 6)})), r"for w of shape \(4, 6\), not \(6, 4\)"),
    (lambda t, c, p, l: adapt(l, {"w": torch.zeros(2, 6)}, None, 0.1, Generator({"w": (2, 6)})), r"for w of shape \(2, 6\), not \(6,\)"),
    (lambda t, c, p, l: adapt(l, t, 2, 0.1, lambda nu: p(nu)), "derived from it, got function"),
    (lambda t, c, p, l: adapt(l, {"b": torch.zeros(4)}, 2, {"b": torch.ones(2, 1)}), r"rates for b must have its shape \(4,\), got \(2, 1\)"),
    (lambda t, c, p, l: adapt(l, t, 2, 0.1, noise_std=float("nan")), "noise_std must be finite"),
    (lambda t, c, p, l: adapt(lambda p: l(p).detach(), t, 2, 0.1), "does not depend on.*constant, or detached"),
    (lambda t, c, p, l: torch.inference_mode()(adapt)(l, t, 2, 0.1), "inference_mode"),
    (lambda t, c, p, l: adapt_linear(l, torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), 0.1, Generator({"w": (5, 4), "b": (5,)})),
     "built without bias, weight"),
    (lambda t, c, p, l: adapt_linear(l, torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), 0.1, Generator({"weight": (4, 5), "bias": (5,)})),
     r"for weight of shape \(4, 5\), not \(5, 4\)"),
    (lambda t, c, p, l: adapt(lambda p: l(p).sum(), t, 2, 0.1), "one loss per task"),
    (lambda t, c, p, l: adapt(lambda p: p["conv1.weight"].flatten(1).sum(1), t, 2, 0.1), "does not depend on.*conv1.bias"),
    (lambda t, c, p, l: Generator({}), "at least one"),
    (lambda t, c, p, l: Generator({"w": (2, 2)}, context_dim=0), "context_dim"),
    (lambda t, c, p, l: Generator({"w": (2, 2)}, init="zero"), "init"),
    (lambda t, c, p, l: Generator({"w": (2, 2, 2)}), "shape"),
    (lambda t, c, p, l: factor_sizes((2, 2), "square"), "factors"),
    (lambda t, c, p, l: conv4(5, image_size=15), "image_size"),
    (lambda t, c, p, l: mlp([3]), "width"),
    (lambda t, c, p, l: from_module(nn.ReLU()), "no parameters"),
])
def test_bad_arguments_are_named(call, message):
    theta, chain, psi = network(torch.float64)
    loss = lambda p: sum(t.flatten(1).sum(1) for t in p.values())
    with pytest.raises(ValueError, match=message):
        call(theta, chain, psi, loss)


# --- torch.compile ---------------------------------------------------------------------------------------------------

def meta_step_on_regression(compile_with, **options):
    """Meta-loss and meta-gradients of an MLP after adaptation, the whole forward pass compiled by `compile_with`."""
    torch.manual_seed(0)
    theta, chain = mlp([2, 8, 8, 1])
    names = ["fc2.weight", "fc2.bias"]
    psi = Generator({n: theta[n].shape for n in names}, DIM, U)
    x, y = torch.randn(TASKS, SUPPORT, 2), torch.randn(TASKS, SUPPORT, 1)
    prefix, suffix = chain.split(names)

    def meta_loss(x, y):
        features = prefix(theta, x)
        loss = lambda p: (suffix({**theta, **p}, features) - y).square().mean((1, 2))
        out = adapt(loss, {n: theta[n] for n in names}, TASKS, 0.3, psi, **options)
        return (suffix({**theta, **out}, features) - y).square().mean()
    torch.compiler.reset()
    loss = (torch.compile(meta_loss, fullgraph=True, backend=compile_with) if compile_with else meta_loss)(x, y)
    loss.backward()
    return [loss.detach(), *(p.grad for p in (*theta.values(), *psi.parameters()))]


@pytest.mark.parametrize("options", [{}, {"steps": 2}, {"first_order": True}, {"steps": 2, "refine": True}], ids=str)
def test_a_compiled_meta_loss_has_the_same_meta_gradients(options):
    for ours, theirs in zip(meta_step_on_regression("aot_eager", **options), meta_step_on_regression(None, **options)):
        # The same float32 operations, but for the order of sums.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factors", ["flat", "natural"])
def test_sister_networks_together_are_those_one_by_one(factors):
    """Values and both derivatives; two sizes, one of them of a single network, and a vector, which has no row."""
    shapes = {"a": (6, 4, 3, 3), "b": (6, 4, 3, 3), "c": (7,), "d": (90, 90)}
    generator = Generator(shapes, context_dim=8, factors=factors).double()
    nu = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)

    def orders(function):
        values = [v for pair in function(nu).values() for v in pair if v.requires_grad]
        first, = torch.autograd.grad(sum((v * v).sum() for v in values), nu, create_graph=True)
        return [*values, first, *torch.autograd.grad(first.square().sum(), generator.parameters())]

    for a, b in zip(orders(generator.together()), orders(generator), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_sister_networks_are_not_computed_together_where_that_would_differ():
    """On a GPU `together` replaces the call; not where a subclass, an exchanged part or a hook makes the call another."""
    class Doubled(Generator):
        def forward(self, nu):
            return {name: (2 * row, col) for name, (row, col) in super().forward(nu).items()}

    make = lambda kind=Generator: kind({"w": (3, 4)}, context_dim=6)
    exchanged, hooked, before, within = make(), make(), make(), make()
    exchanged.cols["w"].inner = nn.Sequential(exchanged.cols["w"].inner)
    hooked.register_forward_hook(lambda *call: None)
    before.register_forward_pre_hook(lambda *call: None)
    within.rows["w"].register_forward_hook(lambda module, given, out: 2 * out)
    assert make().stackable() and make(type("Named", (Generator,), {})).stackable()
    assert not any(generator.stackable() for generator in (make(Doubled), exchanged, hooked, before, within))
