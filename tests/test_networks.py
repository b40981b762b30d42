"""The image networks: sizes from the papers, equality with the oracle in both layouts of a batch of tasks, 16 bits."""

import pytest
import torch
import torch.nn.functional as F

import modgrad
import naive
from modgrad import Generator, adapt, conv4, resnet34, wide_resnet28

TASKS, SUPPORT, QUERY, WAYS, DIM, U = 2, 6, 8, 3, 7, 4
NETWORKS = {  # name: (build, oracle, pixels, tensors that ModGrad adapts)
    "conv4": (lambda: conv4(WAYS, 4, 16), naive.conv4_logits, 16, ["conv3.weight", "conv4.weight"]),
    "cavia": (lambda: conv4(WAYS, 4, 16, context_dim=6), naive.conv4_logits, 16, ["context", "film.bias", "conv4.weight"]),
    "resnet34": (lambda: resnet34(WAYS, 2, 32), naive.resnet34_logits, 32, ["layer4.2.conv1.weight", "layer4.2.conv2.weight"]),
    "wrn28": (lambda: wide_resnet28(WAYS, 2, 16), naive.wide_resnet28_logits, 16, ["layer3.3.conv1.weight", "layer3.3.conv2.weight"]),
}
LAYOUTS = {"task by task": True, "all tasks at once": False}      # the first on CPUs, the second on GPUs


@pytest.fixture(params=LAYOUTS)
def layout(request, monkeypatch):
    monkeypatch.setattr(modgrad, "_task_by_task", lambda x: LAYOUTS[request.param])


def episode(pixels, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    x = lambda n: torch.randn(TASKS, n, 3, pixels, pixels, generator=g, dtype=torch.float64).to(dtype)
    y = lambda n: torch.arange(WAYS).repeat(TASKS, n)[:, :n]
    return x(SUPPORT), y(SUPPORT), x(QUERY), y(QUERY)


def network(name):
    torch.manual_seed(0)
    theta, chain = NETWORKS[name][0]()
    return {n: t.detach().double().requires_grad_() for n, t in theta.items()}, chain


def cross_entropy(logits, labels):
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none").mean(1)


def assert_close(ours, theirs, tolerance=1e-8):
    """Relative to the largest entry of all; a residual network's second derivatives pass through 70 layers."""
    largest = max(t.abs().max().item() for t in theirs)
    assert largest > 1e-6
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max().item() <= tolerance * largest


def test_sizes_are_those_of_the_papers():
    """21.8 million weights (torchvision's ResNet-34 with 1,000 classes), 36.5 million (WRN-28-10 with CIFAR's 10)."""
    count = lambda built: sum(t.numel() for t in built[0].values())
    assert count(resnet34(1000)) == 21_797_672
    assert count(wide_resnet28(10)) == 36_479_194


@pytest.mark.parametrize("name", NETWORKS)
def test_meta_gradients_equal_the_oracle(name, layout):
    theta, chain = network(name)
    _, logits, pixels, names = NETWORKS[name]
    psi = Generator({n: theta[n].shape for n in names}, DIM, U).double()
    support_x, support_y, query_x, query_y = episode(pixels)
    prefix, suffix = chain.split(names)
    features = prefix(theta, support_x)
    inner = lambda p: cross_entropy(suffix({**theta, **p}, features), support_y)
    adapted = adapt(inner, {n: theta[n] for n in names}, TASKS, 0.3, psi)
    ours = cross_entropy(suffix({**theta, **adapted}, prefix(theta, query_x)), query_y).sum()
    theirs = 0
    for t in range(TASKS):
        loss = lambda p: F.cross_entropy(logits(p, support_x[t]), support_y[t])
        out = naive.adapt_one(loss, theta, names, dict(psi.named_parameters()), 0.3, DIM, U)
        assert_close([adapted[n][t] for n in names], [out[n] for n in names])
        theirs = theirs + F.cross_entropy(logits(out, query_x[t]), query_y[t])
    tensors = [*theta.values(), *psi.parameters()]
    gradients = [torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=True) for loss in (ours, theirs)]
    for part in (slice(len(theta)), slice(len(theta), None)):
        assert_close(*(grads[part] for grads in gradients))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_tensor_can_be_given_per_task(name, layout):
    """What MAML does to all of a network, batch norm's scales and shifts included."""
    theta, chain = network(name)
    pixels = NETWORKS[name][2]
    x, y = episode(pixels)[:2]
    own = [{n: t.detach() * (1 + 0.1 * torch.randn_like(t)) for n, t in theta.items()} for _ in range(TASKS)]
    stacked = {n: torch.stack([task[n] for task in own]).requires_grad_() for n in theta}
    together = cross_entropy(chain(stacked, x), y)
    gradients = torch.autograd.grad(together.sum(), list(stacked.values()))
    for t in range(TASKS):
        task = {n: w.requires_grad_() for n, w in own[t].items()}
        loss = F.cross_entropy(NETWORKS[name][1](task, x[t]), y[t])
        assert together[t].item() == pytest.approx(loss.item(), rel=1e-9)
        assert_close([g[t] for g in gradients], torch.autograd.grad(loss, list(task.values())))


@pytest.mark.parametrize("name", NETWORKS)
def test_support_statistics_do_not_see_the_other_queries(name, layout):
    theta, chain = network(name)
    support_x, _, query_x, _ = episode(NETWORKS[name][2])
    alone = chain(theta, torch.cat([support_x, query_x[:, :1]], 1), SUPPORT)[:, SUPPORT:]
    together = chain(theta, torch.cat([support_x, query_x], 1), SUPPORT)[:, SUPPORT:]
    assert torch.allclose(alone[:, 0], together[:, 0], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(chain(theta, query_x)[:, 0], together[:, 0], rtol=1e-3)


@pytest.mark.parametrize("support", [None, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_16_bit_activations_stay_16_bit(name, support, layout):
    theta, chain = network(name)
    theta = {n: t.detach().float() for n, t in theta.items()}
    x = episode(NETWORKS[name][2])[0]
    seen, exact = [], chain(theta, x.float(), support)
    for stage in chain.stages[:-1]:
        seen.append((x := stage.apply(theta, x.bfloat16() if not seen else x, support)).dtype)
    assert set(seen) == {torch.bfloat16}
    y = chain.stages[-1].apply(theta, x, support)
    assert y.dtype == torch.float32 and (y - exact).abs().max() <= 0.3 * exact.abs().max()       # 2^-8 an operation


@pytest.mark.parametrize("build, pixels", [(resnet34, 31), (wide_resnet28, 7), (conv4, 15)])
def test_too_small_an_image_is_refused(build, pixels):
    with pytest.raises(ValueError, match=f"at least {pixels + 1}, got {pixels}"):
        build(5, image_size=pixels)
