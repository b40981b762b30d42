"""Omniglot: update rules against references one task at a time, sampling, bad data, complete and interrupted runs."""

import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
import naive
import runs
import train_omniglot as omni

CPU = torch.device("cpu")
TINY = ["--channels", "4", "--context-dim", "8", "--inner-steps", "4", "--test-steps", "4", "--meta-batch", "2",
        "--meta-steps", "6", "--val-every", "3", "--log-every", "2", "--checkpoint-every", "2", "--threads", "1"]
FEW_SHOT = ["--protocol", "few-shot", "--queries", "3", "--val-episodes", "4", "--test-episodes", "6", *TINY[:4],
            *TINY[8:]]


def setting(*flags):
    """(args, learner, meta-training alphabets, 4 mini-batches of 2 tasks), everything in float64."""
    args = omni.parse_flags([*TINY, *map(str, flags)])
    torch.manual_seed(0)
    learner = omni.build_learner(args, CPU)
    for t in learner.theta.values():
        t.data = t.data.double()
    if learner.generator:
        learner.generator.double()
    split = omni.split_alphabets(DRAWINGS, 25, 1, CPU)["train"]
    batches = omni.draw_batches(split.train, torch.tensor([3, 7]), 4, 20, torch.Generator().manual_seed(0),
                                dtype=torch.float64)
    return args, learner, split, batches


DRAWINGS = omni.synthetic_drawings()
FRESH = omni.fresh_statistics
running = lambda args, tasks: {k: (mean.double(), var.double()) for k, (mean, var) in FRESH(tasks, args, CPU).items()}


@pytest.fixture
def float64(monkeypatch):
    """Whole meta-steps in float64."""
    monkeypatch.setattr(omni, "activation_type", lambda args: torch.float64)
    monkeypatch.setattr(omni, "fresh_statistics", lambda tasks, args, device: running(args, tasks))


# --- references: one task, one network, plain PyTorch ----------------------------------------------------------------

def network(theta, x):
    """conv, pool, batch norm, ReLU, four times, then linear: x (B, 1, S, S) -> (B, 20)."""
    for k in range(1, 5):
        x = F.max_pool2d(F.conv2d(x, theta[f"conv{k}.weight"], theta[f"conv{k}.bias"], padding=1), 2)
        x = F.relu(F.batch_norm(x, None, None, theta[f"norm{k}.weight"], theta[f"norm{k}.bias"], training=True))
    return F.linear(x.flatten(1), theta["head.weight"], theta["head.bias"])


def one_task(batches, task):
    return [(x[task], y[task]) for x, y in map(batches.take, range(len(batches.rows)))]


def sgd_path(theta, task_batches, alpha):
    """Plain SGD: list of (theta_i, L_i, g_i)."""
    theta, path = {n: t.detach() for n, t in theta.items()}, []
    for x, y in task_batches:
        at = {n: t.detach().requires_grad_() for n, t in theta.items()}
        loss = F.cross_entropy(network(at, x), y)
        g = dict(zip(at, torch.autograd.grad(loss, list(at.values()))))
        path.append((theta, loss.detach(), g))
        theta = {n: theta[n] - alpha * g[n] for n in theta}
    return path


def naive_leap(path):
    flat = lambda tensors: torch.cat([tensors[n].flatten() for n in tensors])
    total = 0
    for (a, loss_a, g), (b, loss_b, _) in zip(path, path[1:]):
        delta = -abs(loss_b - loss_a)
        length = torch.sqrt(delta ** 2 + (flat(b) - flat(a)).norm() ** 2)
        total = total + (-(flat(b) - flat(a)) - delta * flat(g)) / length
    return total


def naive_reptile(path):
    return torch.cat([(path[0][0][n] - path[-1][0][n]).flatten() for n in path[0][0]])


def naive_fomaml(path):
    return torch.cat([g.flatten() for g in path[-1][2].values()])


REFERENCES = {"leap": naive_leap, "reptile": naive_reptile, "fomaml": naive_fomaml}


@pytest.mark.parametrize("method", REFERENCES)
def test_the_baselines_follow_their_update_equations(method):
    args, learner, _, batches = setting("--method", method)
    found = omni.DIRECTIONS[method](omni.trajectory(learner, args, batches, running(args, 2)))
    for task in range(2):
        expected = REFERENCES[method](sgd_path(learner.theta, one_task(batches, task), args.inner_lr))
        ours = torch.cat([found[n][task].flatten() for n in learner.theta])
        # float64 with sums in another order over four steps: rounding 1e-16, times a condition of at most 1e4
        assert (ours - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize("method", REFERENCES)
def test_a_meta_step_descends_along_the_mean_direction(method, float64):
    args, learner, split, _ = setting("--method", method)
    omni.alphabets_step(learner, args, split, torch.Generator().manual_seed(5))
    rng = torch.Generator().manual_seed(5)
    chosen = omni.choose_alphabets(25, 2, rng)
    batches = omni.draw_batches(split.train, chosen, 4, 20, rng, dtype=torch.float64)
    paths = [sgd_path(learner.theta, one_task(batches, task), args.inner_lr) for task in range(2)]
    expected = sum(map(REFERENCES[method], paths)) / 2
    found = torch.cat([t.grad.flatten() for t in learner.theta.values()])
    assert (found - expected).abs().max() <= 1e-11 * expected.abs().max()        # as above


def naive_modgrad_step(theta, psi, names, x, y, args):
    """One step of one task: Eq. 9 for nu, Eq. 5 with M for `names`, M = 1 for the other tensors."""
    loss = lambda theta: F.cross_entropy(network(theta, x), y)
    g = naive.gradient(loss, theta, list(theta), None)
    moved = lambda nu: {n: theta[n] - args.inner_lr * g[n] * (naive.modulation(psi, n, theta[n].shape, nu, args.rank)
                                                              if n in names else 1) for n in theta}
    zero = torch.zeros(args.context_dim, dtype=torch.float64, requires_grad=True)
    nu = -torch.autograd.grad(loss(moved(zero)), zero, create_graph=True)[0]
    return moved(nu)


@pytest.mark.parametrize("flags", [(), ("--adapt", "conv4.weight", "head.weight", "head.bias", "--factors", "flat")])
def test_modgrads_windows_equal_the_equations_one_task_at_a_time(flags):
    """Held-out loss after two differentiable steps, and its gradient for psi and for the start of every task."""
    args, learner, split, batches = setting("--method", "modgrad", *flags)
    held = omni.draw_batches(split.held_out, torch.tensor([3, 7]), 1, 20, torch.Generator().manual_seed(1),
                             dtype=torch.float64).take(0)
    start = omni.leaves(omni.expand(learner.theta, 2))
    support_and_held = [batches.take(1), batches.take(2), held]
    losses = omni.window_losses(learner, args, start, support_and_held)
    psi = dict(learner.generator.named_parameters())
    wanted = [*psi.values(), *start.values()]
    to_start, to_psi = omni.window_gradients(learner, args, start, support_and_held)     # psi: of the mean over two tasks
    found = [*(2 * g for g in to_psi), *to_start.values()]
    expected_losses = []
    for task in range(2):
        theta = {n: t[task] for n, t in start.items()}
        for x, y in one_task(batches, task)[1:3]:
            theta = naive_modgrad_step(theta, psi, args.adapt, x, y, args)
        expected_losses.append(F.cross_entropy(network(theta, held[0][task]), held[1][task]))
    expected = torch.autograd.grad(sum(expected_losses), wanted, allow_unused=True)
    # float64; third derivatives through four batch norms lose about five digits
    assert torch.allclose(losses, torch.stack(expected_losses), rtol=1e-9)
    scale = max(t.abs().max() for t in expected)
    assert max((a - b).abs().max() for a, b in zip(found, expected)) <= 1e-8 * scale
    assert max(t.abs().max() for t in found[: len(psi)]) > 0


def test_modgrad_with_m_equal_to_one_is_plain_sgd():
    args, learner, _, batches = setting("--method", "modgrad")
    with torch.no_grad():
        for sister in (*learner.generator.rows.values(), *learner.generator.cols.values()):
            sister.outer.weight.zero_()
            sister.outer.bias[sister.columns:] = 1
    steps = list(omni.trajectory(learner, args, batches, running(args, 2)))
    path = sgd_path(learner.theta, one_task(batches, 1), args.inner_lr)
    for step, (theta, loss, _) in zip(steps, path):
        assert torch.allclose(step.losses[1], loss, rtol=1e-10)
        assert all(torch.allclose(step.theta[n][1], theta[n], rtol=0, atol=1e-12) for n in theta)


@pytest.mark.parametrize("rule", ["leap", "held-out"])
def test_modgrads_meta_step_trains_psi_and_theta(rule, float64):
    args, learner, split, _ = setting("--method", "modgrad", "--theta-update", rule, "--windows", 2, "--unroll", 2)
    omni.alphabets_step(learner, args, split, torch.Generator().manual_seed(5))
    trained = {**learner.theta, **dict(learner.generator.named_parameters())}
    assert all(t.grad is not None and t.grad.isfinite().all() for t in trained.values())
    assert sum(t.grad.abs().sum() for t in learner.generator.parameters()) > 0
    rng = torch.Generator().manual_seed(5)
    chosen = omni.choose_alphabets(25, 2, rng)
    batches = omni.draw_batches(split.train, chosen, 4, 20, rng, dtype=torch.float64)
    held_out = omni.draw_batches(split.held_out, chosen, 2, 20, rng, dtype=torch.float64)
    places = torch.randperm(3, generator=rng)[:2].tolist()            # 2 steps fit in at 0, 1 and 2 of 4
    steps = list(omni.trajectory(learner, args, batches, running(args, 2)))
    psi, to_psi = list(learner.generator.parameters()), 0
    for number, k in enumerate(places):
        taken = [batches.take(k), batches.take(k + 1), held_out.take(number)]
        loss = omni.window_losses(learner, args, omni.leaves(steps[k].theta), taken).mean()
        to_psi = to_psi + torch.cat([g.flatten() for g in torch.autograd.grad(loss, psi)]) / len(places)
    found = torch.cat([p.grad.flatten() for p in psi])
    assert (found - to_psi).norm() <= 1e-9 * to_psi.norm()                  # float64
    if rule == "leap":
        expected = omni.leap_direction(steps)["head.weight"].mean(0)
    else:
        expected = 0
        for number, k in enumerate(places):
            start = omni.leaves(steps[k].theta)
            loss = omni.window_losses(learner, args, start, [batches.take(k), batches.take(k + 1), held_out.take(number)]).mean()
            expected = expected + torch.autograd.grad(loss, start["head.weight"])[0].sum(0) / len(places)
    assert torch.allclose(learner.theta["head.weight"].grad, expected, rtol=1e-9, atol=1e-12)      # float64


def test_mamls_meta_gradient_is_that_of_one_task_after_the_other(float64):
    args, learner, split, _ = setting("--method", "maml", "--inner-steps", 2)
    omni.alphabets_step(learner, args, split, torch.Generator().manual_seed(5))
    found = {n: t.grad.clone() for n, t in learner.theta.items()}
    rng = torch.Generator().manual_seed(5)
    chosen = omni.choose_alphabets(25, 2, rng)
    batches = omni.draw_batches(split.train, chosen, 2, 20, rng, dtype=torch.float64)
    held_x, held_y = omni.draw_batches(split.held_out, chosen, 1, 20, rng, dtype=torch.float64).take(0)
    total = 0
    for task in range(2):
        theta = dict(learner.theta)
        for x, y in one_task(batches, task):
            g = torch.autograd.grad(F.cross_entropy(network(theta, x), y), list(theta.values()), create_graph=True)
            theta = {n: t - args.inner_lr * d for (n, t), d in zip(theta.items(), g)}
        total = total + F.cross_entropy(network(theta, held_x[task]), held_y[task]) / 2
    expected = dict(zip(learner.theta, torch.autograd.grad(total, list(learner.theta.values()))))
    scale = max(t.abs().max() for t in expected.values())
    # float64; second derivatives through two steps of four batch norms lose about five digits
    assert max((found[n] - expected[n]).abs().max() for n in found) <= 1e-9 * scale


@pytest.mark.parametrize("flags", ["--method modgrad --windows 2", "--method leap", "--method reptile", "--precision bf16",
                                   "--protocol few-shot", "--protocol few-shot --method maml"])
def test_recorded_meta_steps_are_launched_ones(flags, monkeypatch):
    """With a recording imitated on the CPU; on a GPU: test_cuda.py."""
    made, found = runs.imitate_cuda_graphs(monkeypatch), []
    for device in (torch.device("cuda"), CPU):
        args = omni.parse_flags(["--channels", "4", "--inner-steps", "3", "--meta-batch", "2", "--test-steps", "3",
                                 "--context-dim", "8", "--eval-batch", "2", *flags.split()])
        torch.manual_seed(0)
        learner, drawings = omni.build_learner(args, CPU), omni.synthetic_drawings()
        split = (omni.split_characters(drawings, CPU) if args.protocol == "few-shot" else
                 omni.split_alphabets(drawings, 25, 1, CPU))["train"]
        part, rng = omni.PARTS[args.protocol](learner, args, device), torch.Generator().manual_seed(0)
        optimisers = omni.build_optimisers(learner, args)
        for _ in range(3):
            [optimiser.zero_grad() for optimiser in optimisers]
            found.append(omni.META_STEPS[args.protocol](learner, args, split, rng, part))
            [optimiser.step() for optimiser in optimisers]
        if args.protocol == "multi-shot":
            few = split._replace(train=split.train[:3], held_out=split.held_out[:3], names=split.names[:3])
            accuracies, curves = omni.evaluate(learner, args, few, 0, "test", part)        # two alphabets and one
            found += [torch.tensor(accuracies), torch.tensor(curves["loss"])]
        found.append(learner.theta["conv2.weight"].detach())
    half = len(found) // 2
    recorded = 1 if args.protocol == "few-shot" else 2 + len({"leap": "s", "modgrad": "sw"}.get(args.method, ""))
    assert len(made) == recorded               # steps of two tasks and of one; LEAP's segment; the window
    assert all(torch.equal(*pair) for pair in zip(found[:half], found[half:]))


@pytest.mark.parametrize("protocol", ["multi-shot", "few-shot"])
def test_evaluation_does_not_depend_on_how_many_tasks_are_at_once(protocol, float64):
    args = omni.parse_flags(["--protocol", protocol, "--channels", "4", "--test-steps", "3", "--context-dim", "8"])
    torch.manual_seed(0)
    learner, drawings = omni.build_learner(args, CPU), omni.synthetic_drawings()
    for p in learner.parameters():
        p.data = p.data.double()
    split = (omni.split_characters(drawings, CPU) if protocol == "few-shot" else omni.split_alphabets(drawings, 25, 1, CPU))["test"]
    found = []
    for args.eval_batch in (10, 3, 25):
        accuracies, curves = omni.evaluate(learner, args, split, 23, "test")
        assert len(accuracies) == (23 if protocol == "few-shot" else len(split.names))
        found.append(torch.tensor(curves["loss"] if protocol == "multi-shot" else accuracies, dtype=torch.float64))
    assert len(set(found[0].tolist())) > 1
    assert all((found[0] - other).abs().max() <= 1e-9 for other in found)        # float64, and steps that multiply differences


def test_every_batch_of_evaluation_tasks_has_noise_of_its_own(monkeypatch):
    args = omni.parse_flags(["--protocol", "few-shot", "--gradient-noise", "0.1", "--eval-batch", "4"])
    split, seen = omni.split_characters(omni.synthetic_drawings(), CPU)["test"], []
    monkeypatch.setattr(omni, "adapt_and_predict", lambda learner, args, x, y, queries, rng, train:
                        seen.append(torch.rand(1, generator=rng).item()) or torch.zeros(*queries.shape[:2], args.ways))
    omni.evaluate(None, args, split, 16, "test")
    assert len(set(seen)) == len(seen) >= 4


# --- batch norm ------------------------------------------------------------------------------------------------------

def test_running_statistics_belong_to_a_task_and_start_anew():
    args, learner, _, batches = setting("--method", "modgrad")
    seen = running(args, 2)
    list(omni.trajectory(learner, args, batches, seen))
    alone = running(args, 1)
    second = batches._replace(rows=batches.rows[:, 1:], labels=batches.labels[:, 1:], moves=batches.moves[:, 1:])
    list(omni.trajectory(learner, args, second, alone))
    for k in omni.BLOCKS:
        for both, one in zip(seen[k], alone[k]):
            assert torch.allclose(both.view(2, -1)[1], one[: args.channels], rtol=1e-10)
    assert torch.equal(omni.fresh_statistics(1, args, CPU)[1][0], torch.zeros(4))
    assert torch.equal(omni.fresh_statistics(1, args, CPU)[1][1], torch.ones(4))


def test_each_step_updates_the_running_statistics_once():
    """The second pass of a modulated step, for the context, must leave them alone."""
    args, learner, _, batches = setting("--method", "modgrad")
    seen = running(args, 2)
    x, y = batches.take(0)
    omni.inner_step(learner, args, omni.leaves(omni.expand(learner.theta, 2)), x, y, seen)
    y1 = F.max_pool2d(F.conv2d(x[1], learner.theta["conv1.weight"], learner.theta["conv1.bias"], padding=1), 2)
    assert torch.allclose(seen[1][0].view(2, -1)[1], 0.1 * y1.mean((0, 2, 3)), rtol=1e-10)
    assert torch.allclose(seen[1][1].view(2, -1)[1], 0.9 + 0.1 * y1.var((0, 2, 3)), rtol=1e-10)


def test_a_gpus_first_layer_is_the_convolution_with_both_derivatives():
    rng = torch.Generator().manual_seed(0)
    x = torch.rand(3, 4, 1, 12, 12, generator=rng, dtype=torch.float64)
    weight = torch.randn(3 * 5, 1, 3, 3, generator=rng, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3 * 5, generator=rng, dtype=torch.float64, requires_grad=True)
    convolved = torch.cat([F.max_pool2d(F.conv2d(x[t], weight[5 * t:5 * t + 5], bias[5 * t:5 * t + 5], padding=1), 2)
                           for t in range(3)], 1)
    found = omni.product_and_pool(x, weight, bias)
    assert found.is_contiguous(memory_format=torch.channels_last)
    for ours, theirs in zip(derivatives(found, weight, bias), derivatives(convolved, weight, bias), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10)


def derivatives(h, weight, bias):
    """h, the gradient of a cubic function of it, and the gradient of that gradient's square."""
    first = torch.autograd.grad((h ** 3).sum(), (weight, bias), create_graph=True)
    return h, *first, *torch.autograd.grad(sum((g ** 2).sum() for g in first), (weight, bias))


def test_held_out_images_are_classified_one_by_one():
    args, learner, split, batches = setting("--method", "leap")
    seen = running(args, 2)
    theta = list(omni.trajectory(learner, args, batches, seen))[-1].after
    x, _ = batches.take(0)
    together = omni.classify(theta, x, seen, training=False)
    alone = omni.classify(theta, x[:, 4:5], seen, training=False)
    assert torch.allclose(together[:, 4:5], alone, rtol=1e-10)


# --- splits and sampling ---------------------------------------------------------------------------------------------

def labelled(alphabets, characters):
    """Drawings whose pixels tell character and drawing: first pixel row the character, second the drawing."""
    count = sum(characters)
    images = np.zeros((count, 20, omni.SIDE, omni.SIDE), np.uint8)
    images[:, :, 0] = np.arange(count)[:, None, None] % 250
    images[:, :, 1] = np.arange(20)[:, None]
    names = [name for name, n in zip(alphabets, characters) for _ in range(n)]
    return omni.Drawings(images, names, "test", True)


def test_alphabets_are_split_by_seed_and_small_ones_are_left_out():
    sizes = [22] * 46 + [14, 16, 14, 17]
    drawings = labelled([f"a{k:02d}" for k in range(50)], sizes)
    splits = omni.split_alphabets(drawings, 25, 1, CPU)
    assert {name: len(split.names) for name, split in splits.items()} == {"train": 25, "val": 11, "test": 10}
    names = [name for split in splits.values() for name in split.names]
    assert len(set(names)) == 46 and not set(names) & {"a46", "a47", "a48", "a49"}
    assert splits["train"].train.shape == (25, 300, 28, 28) and splits["train"].held_out.shape == (25, 100, 28, 28)
    same, other = (omni.split_alphabets(drawings, 25, seed, CPU) for seed in (1, 2))
    assert same["test"].names == splits["test"].names and torch.equal(same["test"].train, splits["test"].train)
    assert other["test"].names != splits["test"].names


def test_rows_of_a_task_are_20_characters_and_held_out_drawings_are_apart():
    split = omni.split_alphabets(labelled([f"a{k}" for k in range(40)], [22] * 40), 25, 1, CPU)["train"]
    for images, each, drawings in ((split.train, 15, range(5, 20)), (split.held_out, 5, range(5))):
        characters = images[0, :, 0, 0].view(20, each)
        assert (characters == characters[:, :1]).all() and len(characters[:, 0].unique()) == 20
        assert images[0, :each, 1, 0].tolist() == list(drawings)


def test_mini_batches_pass_over_all_drawings_in_random_order_with_right_labels():
    images = torch.zeros(3, 300, 28, 28, dtype=torch.uint8)
    batches = omni.draw_batches(images, torch.tensor([2, 0]), 30, 20, torch.Generator().manual_seed(0))
    assert batches.rows.shape == batches.labels.shape == (30, 2, 20)
    for task, alphabet in enumerate([2, 0]):
        rows = batches.rows[:, task].flatten() - 300 * alphabet
        assert torch.equal(rows.bincount(), torch.full((300,), 2))
        assert torch.equal(batches.labels[:, task].flatten(), rows // 15)
    assert not torch.equal(batches.rows[:, 0] - 600, batches.rows[:, 1])


def test_imbalanced_tasks_have_1_to_25_images_per_class():
    pool, sizes = omni.imbalanced_pool(200, 15, torch.Generator().manual_seed(0))
    counts = torch.zeros(200, 20, dtype=torch.long)
    for task in range(200):
        used = pool[task, : sizes[task, 0]]
        counts[task] = (used // 15).bincount(minlength=20)
        for label in range(20):
            drawings = used[used // 15 == label]
            assert len(drawings.unique()) == min(len(drawings), 15)
    assert counts.min() == 1 and counts.max() == 25
    assert abs(counts.float().mean() - 13) < 0.5       # 4,000 draws of U{1..25}: standard error 0.11
    batches = omni.draw_batches(torch.zeros(2, 300, 28, 28, dtype=torch.uint8), torch.tensor([1, 0]), 40, 20,
                                torch.Generator().manual_seed(0), imbalanced=True)
    assert torch.equal(batches.labels[:, 0], (batches.rows[:, 0] - 300) // 15)
    assert len(batches.labels[:, 0].flatten().bincount().unique()) > 5


def test_every_alphabet_comes_before_one_comes_twice():
    assert len(omni.choose_alphabets(25, 20, torch.Generator().manual_seed(0)).unique()) == 20
    chosen = omni.choose_alphabets(3, 7, torch.Generator().manual_seed(0))
    assert sorted(chosen[:3].tolist()) == sorted(chosen[3:6].tolist()) == [0, 1, 2]


def test_moves_are_seeded_and_within_their_limits():
    moves = omni.draw_moves((2000,), torch.Generator().manual_seed(0))
    assert torch.equal(moves, omni.draw_moves((2000,), torch.Generator().manual_seed(0)))
    back, shift = moves[:, :, :2], -torch.linalg.solve(moves[:, :, :2], moves[:, :, 2])
    scale = torch.linalg.det(back).rsqrt()
    assert 0.8 <= scale.min() < 0.81 and 1.19 < scale.max() <= 1.2
    assert 0.39 < shift.abs().max() <= 0.4 + 1e-6      # 20 % of an image two units wide, float32
    angle = torch.atan2(back[:, 0, 1], back[:, 0, 0])
    assert angle.min() < -3 and angle.max() > 3


def test_a_quarter_turn_and_a_shift_move_pixels_where_they_should():
    image = torch.rand(1, 1, 1, 28, 28)
    turn = torch.tensor([[[[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]]])
    assert any(torch.equal(omni.move(image, turn)[0, 0, 0], image[0, 0, 0].rot90(k)) for k in (1, 3))
    shift = torch.tensor([[[[1.0, 0.0, -2 * 3 / 28], [0.0, 1.0, 0.0]]]])                  # to the right by 3 pixels
    moved = omni.move(image, shift)[0, 0, 0]
    assert torch.equal(moved[:, 3:], image[0, 0, 0, :, :-3]) and (moved[:, :3] == 0).all()


def test_few_shot_classes_are_characters_in_four_turns():
    drawings = labelled(["a", "b"], [30, 30])
    splits = omni.split_characters(drawings, CPU)
    sizes = {name: len(classes) // 4 for name, classes in splits.items()}
    assert sizes == {"train": 41, "val": 4, "test": 15} and sum(sizes.values()) == 60
    characters = {name: set((1 - classes[: len(classes) // 4, 0, 0, 0].int()).remainder(256).tolist())
                  for name, classes in splits.items()}
    assert len(set.union(*characters.values())) == 60 and not characters["train"] & characters["test"]
    assert omni.split_characters(DRAWINGS, CPU)["val"].float().mean() < 0.3          # ink is 1 and rarer than paper
    upright, turned = splits["val"][0], splits["val"][4]
    assert torch.equal(turned, upright.rot90(1, (1, 2)))


def test_episodes_have_distinct_classes_and_disjoint_images():
    args = omni.parse_flags(["--protocol", "few-shot", "--ways", "5", "--shots", "2", "--queries", "3"])
    classes = torch.arange(40 * 20, dtype=torch.float32).view(40, 20, 1, 1).expand(-1, -1, 28, 28)
    support_x, support_y, query_x, query_y = omni.sample_episodes(classes, 6, args, torch.Generator().manual_seed(0))
    assert support_x.shape == (6, 10, 1, 28, 28) and query_x.shape == (6, 15, 1, 28, 28)
    for task in range(6):
        ids = torch.cat([support_x[task, :, 0, 0, 0], query_x[task, :, 0, 0, 0]]).long()
        labels = torch.cat([support_y[task], query_y[task]])
        assert len(ids.unique()) == 25
        of_label = [set((ids[labels == label] // 20).tolist()) for label in range(5)]
        assert all(len(found) == 1 for found in of_label) and len(set.union(*of_label)) == 5
    again = omni.sample_episodes(classes, 6, args, torch.Generator().manual_seed(0))
    assert torch.equal(again[0], support_x)


# --- files -----------------------------------------------------------------------------------------------------------

def write_alphabets(root, alphabets, characters=1, drawings=20):
    pixels = np.random.default_rng(0).integers(0, 2, (105, 105)).astype(bool)
    for alphabet in alphabets:
        for k in range(characters):
            folder = root / alphabet / f"character{k:02d}"
            folder.mkdir(parents=True)
            for n in range(drawings):
                Image.fromarray(pixels ^ (n == 3)).save(folder / f"{k:04d}_{n:02d}.png")
    return pixels


def test_drawings_are_read_in_order_and_cached(tmp_path):
    pixels = write_alphabets(tmp_path, ["B", "A"], characters=2)
    drawings = omni.load_drawings(tmp_path)
    assert drawings.images.shape == (4, 20, 28, 28) and drawings.alphabets == ["A", "A", "B", "B"]
    nearest = np.asarray(Image.fromarray(pixels).resize((28, 28), Image.LANCZOS))      # as LEAP's script asks for
    assert np.array_equal(drawings.images[0, 0], nearest) and np.array_equal(drawings.images[2, 3], 1 - nearest)
    assert list((tmp_path / "cache").glob("*.npy"))
    assert np.array_equal(omni.load_drawings(tmp_path).images, drawings.images)


def test_both_zips_have_to_be_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(omni, "HALVES", {"images_background": (2, 4), "images_evaluation": (1, 2)})
    write_alphabets(tmp_path / "images_background", ["A", "B"], characters=2)
    with pytest.raises(common.DataError, match="lacks the folder images_evaluation"):
        omni.load_drawings(tmp_path)
    write_alphabets(tmp_path / "images_evaluation", ["C"], characters=2)
    assert omni.load_drawings(tmp_path).alphabets == ["A", "A", "B", "B", "C", "C"]
    (tmp_path / "images_background" / "A").rename(tmp_path / "images_evaluation" / "A")
    with pytest.raises(common.DataError, match="1 alphabets with 2 characters, not 2 with 4"):
        omni.load_drawings(tmp_path)


def test_a_missing_or_unreadable_drawing_is_named(tmp_path):
    write_alphabets(tmp_path, ["A"])
    broken = tmp_path / "A" / "character00" / "0000_07.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(common.DataError, match="0000_07.png is not a readable image"):
        omni.load_drawings(tmp_path)
    broken.unlink()
    with pytest.raises(common.DataError, match="character00 holds 19 drawings"):
        omni.load_drawings(tmp_path)


def test_too_few_alphabets_for_the_split_are_refused():
    with pytest.raises(common.DataError, match="35 of 36 alphabets .* 36 are needed"):
        omni.split_alphabets(labelled([f"a{k}" for k in range(36)], [20] * 35 + [19]), 25, 1, CPU)


def test_a_truncated_zip_is_refused(tmp_path, monkeypatch):
    def truncated(urls, target, **known):
        target.write_bytes(b"PK\x03\x04 the rest is missing")
        return target
    monkeypatch.setattr(omni, "fetch_file", truncated)
    with pytest.raises(common.DataError, match="images_background.zip"):
        omni.download(tmp_path)
    assert not (tmp_path / "images_background").exists()


def test_the_download_is_checked_unpacked_and_not_repeated(tmp_path, monkeypatch):
    asked = []

    def fetch(urls, target, **known):
        asked.append((urls[0].rsplit("/", 1)[1], known["size"], len(known["sha256"]), len(known["md5"])))
        import zipfile
        with zipfile.ZipFile(target, "w") as archive:
            archive.writestr(f"{target.stem}/A/character01/0001_01.png", b"")
        return target
    monkeypatch.setattr(omni, "fetch_file", fetch)
    omni.download(tmp_path)
    omni.download(tmp_path)
    assert asked == [("images_background.zip", 9_464_212, 64, 32), ("images_evaluation.zip", 6_462_886, 64, 32)]
    assert (tmp_path / "images_evaluation" / "A" / "character01" / "0001_01.png").exists()


def test_synthetic_alphabets_are_distinct_and_repeatable():
    again = omni.synthetic_drawings()
    assert np.array_equal(again.images, DRAWINGS.images) and DRAWINGS.images.shape == (920, 20, 28, 28)
    ink = 1.0 - DRAWINGS.images[:40].reshape(40, 20, -1)
    within = np.mean([np.linalg.norm(a[0] - a[1]) for a in ink])
    between = np.mean([np.linalg.norm(a[0] - b[0]) for a, b in zip(ink, ink[1:])])
    assert 0 < within < 0.9 * between


# --- complete runs ---------------------------------------------------------------------------------------------------

def call(home, monkeypatch, *flags):
    """A run inside this process: as `runs.script`, without the seconds that a new interpreter needs."""
    monkeypatch.chdir(home)
    threads = torch.get_num_threads()
    try:
        omni.main([str(flag) for flag in flags])
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def complete_run(tmp_path_factory):
    """An uninterrupted tiny run in a folder without data: (its folder, what it printed)."""
    return runs.complete("train_omniglot.py", *TINY, home=tmp_path_factory.mktemp("home"))


def test_a_run_without_data_is_complete_and_says_synthetic(complete_run):
    run, printed = complete_run
    runs.assert_whole_and_synthetic(run, printed)
    result = runs.result(run)
    assert result["tasks"] == 10 and result["value"] == pytest.approx(result["curves"]["accuracy"][-1])
    assert len(result["curves"]["loss"]) == 4 and result["curves"]["accuracy_steps"] == [1, 4]
    assert runs.logged(run, "meta_step", "loss") == [2, 4, 6]
    assert runs.logged(run, "meta_step", "val_accuracy") == [3, 6]


@pytest.mark.parametrize("flags", [
    ("--method", "leap", "--imbalanced"), ("--method", "reptile"), ("--method", "fomaml", "--precision", "bf16"),
    ("--method", "maml"), ("--theta-update", "held-out", "--first-order"),
])
def test_the_other_methods_run(flags, tmp_path, monkeypatch):
    call(tmp_path, monkeypatch, *TINY, *flags, "--meta-steps", 2, "--out", "run")
    assert runs.result(tmp_path / "run")["meta_steps"] == 2


@pytest.mark.parametrize("method", ["modgrad", "maml"])
def test_few_shot_runs(method, tmp_path, monkeypatch):
    call(tmp_path, monkeypatch, *FEW_SHOT, "--method", method, "--gradient-noise", 0.01, "--out", "run")
    result = runs.result(tmp_path / "run")
    assert result["tasks"] == 6 and result["config"]["ways"] == 5
    assert result["config"]["inner_steps"] == (1 if method == "modgrad" else 5)


def test_leap_adapts_faster_after_meta_training(tmp_path, monkeypatch):
    """Mean training loss on unseen alphabets over 20 steps, before and after 6 meta-steps."""
    args = omni.parse_flags(["--method", "leap", "--channels", "16", "--inner-steps", "10", "--test-steps", "20",
                             "--meta-batch", "5", "--threads", "1"])
    torch.manual_seed(0)
    learner, splits = omni.build_learner(args, CPU), omni.split_alphabets(DRAWINGS, 25, 1, CPU)
    loss = lambda: np.mean(omni.evaluate(learner, args, splits["test"], 0, "test")[1]["loss"])
    before, rng = loss(), torch.Generator().manual_seed(0)
    optimiser, = omni.build_optimisers(learner, args)
    for _ in range(6):
        omni.alphabets_step(learner, args, splits["train"], rng)
        optimiser.step()
    assert loss() < before - 0.02                      # seeds 0 to 2 gain 0.03 to 0.05


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_resumes_to_the_same_numbers(number, complete_run, tmp_path, monkeypatch):
    run = tmp_path / "run"
    runs.interrupt(number, "train_omniglot.py", *TINY, out=run, log_lines=1)
    call(tmp_path, monkeypatch, *TINY, "--out", run, "--resume")
    assert (run / "log.jsonl").read_text() == (complete_run[0] / "log.jsonl").read_text()
    ours, theirs = runs.result(run), runs.result(complete_run[0])
    assert ours["curves"] == theirs["curves"] and ours["accuracies"] == theirs["accuracies"]


@pytest.mark.parametrize("flags, message", [
    (["--ways", "5"], "--ways is 5"),
    (["--protocol", "few-shot", "--method", "leap"], "not leap"),
    (["--adapt", "conv9.weight"], "conv9.weight"),
    (["--adapt", "head.weight", "--method", "leap"], "with leap all weights move"),
    (["--gradient-noise", "0.1"], "--gradient-noise is for"),
    (["--protocol", "few-shot", "--imbalanced"], "--imbalanced is for"),
    (["--protocol", "few-shot", "--benchmark"], "--benchmark is for"),
    (["--protocol", "few-shot", "--windows", "3"], "--windows is for --protocol multi-shot"),
    (["--shots", "5"], "--shots is for --protocol few-shot"),
    (["--method", "reptile", "--first-order"], "--first-order is for --method modgrad or maml"),
    (["--picture", "figure"], "--picture figure"),
    (["--data", "no/such/folder"], "no/such/folder"),
    (["--batch", "1"], "--batch is 1"),
    (["--windows", "4", "--unroll", "2"], "do not fit"),
    (["--inner-steps", "1", "--method", "leap"], "--inner-steps is 1"),
    (["--train-alphabets", "36"], "--train-alphabets"),
    (["--protocol", "few-shot", "--shots", "10", "--queries", "11"], "10 shots + 11 queries"),
    (["--kernel", "triton", "--device", "cpu"], "triton"),
    (["--smoke", "--data", "somewhere"], "--smoke"),
    (["--figure", "no/run"], "no/run"),
])
def test_bad_flags_are_refused_before_a_run_folder_exists(flags, message, tmp_path, monkeypatch):
    with pytest.raises(common.UsageError, match=message.replace("+", r"\+")):
        call(tmp_path, monkeypatch, *TINY, *flags, "--out", "run")
    assert not (tmp_path / "run").exists()


def test_a_usage_error_ends_in_one_line_and_status_2(tmp_path):
    done = runs.script("train_omniglot.py", "--data", "no/such/folder", cwd=tmp_path)
    assert done.returncode == 2 and "no/such/folder" in done.stderr and "Traceback" not in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    with pytest.raises(common.UsageError, match="non-finite"):
        call(tmp_path, monkeypatch, *TINY, "--method", "leap", "--meta-lr", 1e30, "--out", "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_the_figure_is_drawn_from_finished_runs(complete_run, tmp_path, monkeypatch):
    call(tmp_path, monkeypatch, "--figure", complete_run[0], complete_run[0], "--picture", tmp_path / "fig.png")
    assert Image.open(tmp_path / "fig.png").size[0] == 1000


def test_the_benchmarks_contenders_agree(capsys, tmp_path, monkeypatch):
    call(tmp_path, monkeypatch, *TINY, "--benchmark")
    printed = capsys.readouterr().out
    # float64 rounding, a hundred times more after each of two steps; another network or other images differ by about 1
    assert float(printed.rsplit(" ", 1)[1]) < 1e-8 and "meta-steps a minute" in printed


@pytest.mark.skipif("MODGRAD_DATA" not in os.environ, reason="MODGRAD_DATA names no folder with real data")
@pytest.mark.parametrize("protocol", [TINY, FEW_SHOT])
def test_the_real_drawings_train(protocol, tmp_path, monkeypatch, capsys):
    data = Path(os.environ["MODGRAD_DATA"]) / "omniglot"
    call(tmp_path, monkeypatch, *protocol, "--data", data.absolute(), "--out", "run")
    assert "50 alphabets, 1623 characters" in capsys.readouterr().out
    assert runs.result(tmp_path / "run")["synthetic"] is False
