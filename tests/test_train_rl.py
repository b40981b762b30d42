"""Meta-reinforcement learning: the pieces of TRPO, the inner step, the environments, the script as its users run it."""

import importlib.util
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import naive
import runs
import train_rl as rl
from common import UsageError, read_log

TINY = ["--hidden", "8", "--meta-batch", "3", "--rollouts", "3", "--iterations", "4", "--test-tasks", "5",
        "--context-dim", "4", "--checkpoint-every", "1", "--threads", "1"]
WEIGHTS = ["--adapt", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias", "fc3.weight", "fc3.bias", "log_std"]
CASES = {"modgrad": [], "all weights": WEIGHTS, "one layer": ["--method", "modgrad", "--adapt", "fc2.weight", "fc2.bias"],
         "maml": ["--method", "maml"], "cavia": ["--method", "cavia"]}
needs_cheetah = pytest.mark.skipif(None in map(importlib.util.find_spec, ("mujoco", "gymnasium")),
                                   reason="mujoco and gymnasium are not installed")


@pytest.fixture
def double():
    """float64 everywhere, so that finite differences have digits to spare."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(case):
    """(args, learner) of a small navigation policy; sigma and M differ from 1, so that a forgotten one shows, and
    biases from 0, as a ReLU whose inputs are all dead would otherwise have its kink where derivatives are compared."""
    args = rl.parse_flags([*CASES[case], "--hidden", "8", "--context-dim", "4", "--rank", "3", "--inner-lr", "0.3",
                           "--init-std", "0.7"])
    torch.manual_seed(0)
    learner = rl.build_learner(args, rl.Navigation, torch.device("cpu"))
    for k in (1, 2, 3):
        learner.theta[f"fc{k}.bias"].data += 0.2 * torch.randn_like(learner.theta[f"fc{k}.bias"])
    if learner.generator:
        for p in learner.generator.parameters():
            p.data += 0.05 * torch.randn_like(p)
    return args, learner


def random_batch(seed, tasks=3, steps=12):
    """Steps with every weight different, as after roll-outs that end early."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(tasks, steps, *shape, generator=rng)
    weights = draw().exp()
    return rl.Batch(draw(2), draw(2), draw(), weights / weights.sum(1, keepdim=True))


def random_rollouts(seed, tasks=2, rollouts=3, horizon=7):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, horizon + 1, (tasks, rollouts, 1), generator=rng)
    mask = (torch.arange(horizon) < lengths).to(torch.get_default_dtype())
    draw = lambda *shape: torch.randn(tasks, rollouts, horizon, *shape, generator=rng)
    return rl.Rollouts(draw(2), draw(2), draw() * mask, mask)


# --- the losses' ingredients ---

def test_gae_is_the_sum_of_discounted_residuals(double):
    rollouts, gamma, lambda_ = random_rollouts(1), 0.9, 0.8
    values = torch.randn_like(rollouts.rewards)
    ours = rl.gae(rollouts.rewards, values, rollouts.mask, gamma, lambda_)
    for t in range(2):
        for r in range(3):
            length, expected = int(rollouts.mask[t, r].sum()), [0.0] * 7
            for step in range(length):
                for k in range(step, length):
                    following = values[t, r, k + 1] if k + 1 < length else 0.0
                    residual = rollouts.rewards[t, r, k] + gamma * following - values[t, r, k]
                    expected[step] += (gamma * lambda_) ** (k - step) * float(residual)
            assert np.allclose(ours[t, r], expected, rtol=0, atol=1e-12)       # sums of seven float64 numbers


def test_the_baseline_is_a_least_squares_fit_of_the_returns(double):
    rollouts, gamma = random_rollouts(2, horizon=30), 0.95
    ours = rl.baseline_values(rollouts, gamma, ridge=1e-12)
    for t in range(2):
        rows, targets = [], []
        for r in range(3):
            length = int(rollouts.mask[t, r].sum())
            for step in range(length):
                o, s = rollouts.observations[t, r, step].numpy(), step / 100
                rows.append([*o, *o**2, s, s**2, s**3, 1.0])
                targets.append(sum(gamma ** (k - step) * float(rollouts.rewards[t, r, k]) for k in range(step, length)))
        fitted = np.array(rows) @ np.linalg.lstsq(np.array(rows), np.array(targets), rcond=None)[0]
        # The normal equations square the condition number (about 1e4 here, t to t³): 1e-16 * 1e8 leaves 8 digits.
        assert np.allclose(ours[t][rollouts.mask[t] > 0], fitted, rtol=0, atol=1e-6)


def test_advantages_are_normalised_over_the_steps_that_happened(double):
    rollouts = random_rollouts(3)
    batch = rl.Batch.of(rollouts, rl.parse_flags([]))
    for t in range(2):
        there = rollouts.mask[t].flatten() > 0
        assert abs(batch.advantages[t][there].mean()) < 1e-12                  # rounding of float64 sums
        assert abs(batch.advantages[t][there].var(correction=0) - 1) < 1e-6    # the 1e-8 that guards the division
        assert (batch.weights[t][~there] == 0).all() and (batch.advantages[t][~there] == 0).all()
        per_rollout = batch.weights[t].view(3, -1).sum(1)
        assert torch.allclose(per_rollout, torch.full((3,), 1 / 3))            # each roll-out counts the same


def test_thinning_keeps_every_kth_step_of_each_rollout(double):
    rollouts = random_rollouts(4)
    thin = rl.Batch.of(rollouts, rl.parse_flags([])).every(3, 7)
    assert torch.equal(thin.observations, rollouts.observations[:, :, [0, 3, 6]].flatten(1, 2))
    assert torch.allclose(thin.weights.sum(1), torch.ones(2))


def test_density_and_divergence_are_those_of_gaussians(double):
    mean, other, action = torch.randn(3, 2, 5, 4).unbind(0)
    log_std, log_other = torch.randn(2, 2, 1, 4).unbind(0)
    p, q = (torch.distributions.Normal(m, s.exp()) for m, s in ((mean, log_std), (other, log_other)))
    assert torch.allclose(rl.log_prob(mean, log_std, action), p.log_prob(action).sum(-1))
    expected = torch.distributions.kl_divergence(p, q).sum(-1)
    assert torch.allclose(rl.gaussian_kl(mean, log_std, other, log_other), expected)


# --- the inner step ---

def unit_vector(size):
    v = torch.randn(size, generator=torch.Generator().manual_seed(3))
    return v / v.norm()


def naive_inner_step(args, learner, start, batch, t, rate):
    """The step of task t alone, by tests/naive.py: one task, M written out."""
    def loss(params):
        net = {name: tensor for name, tensor in {**learner.theta, **params}.items() if name.startswith("fc")}
        x = batch.observations[t]
        if "context" in params:
            x = torch.cat([x, params["context"].expand(len(x), -1)], 1)
        log_std = params.get("log_std", learner.theta["log_std"])
        density = torch.distributions.Normal(naive.mlp_output(net, x), log_std.exp())
        return -(density.log_prob(batch.actions[t]).sum(1) * batch.advantages[t] * batch.weights[t]).sum()

    start = {name: tensor[t].detach().requires_grad_() for name, tensor in start.items()}
    psi = dict(learner.generator.named_parameters()) if learner.generator else None
    return naive.adapt_one(loss, start, list(start), psi, rate * args.inner_lr, args.context_dim, args.rank,
                           normalise_context=args.normalise_context)


@pytest.mark.parametrize("case", CASES)
def test_updates_equal_the_naive_reference_task_by_task(case, double):
    args, learner = small(case)
    current = learner.unadapted(3)
    for update in range(2):                       # the second one starts from a different point for each task
        batch = random_batch(update)
        rate = 1.0 if update == 0 else 0.5
        after = rl.adapted_policy(learner, current, batch, args, differentiable=False, rate=rate)
        for t in range(3):
            for name, expected in naive_inner_step(args, learner, current, batch, t, rate).items():
                assert torch.allclose(after[name][t], expected, rtol=0, atol=1e-12)       # float64, other order of sums
                assert not torch.allclose(after[name][t], current[name][t], rtol=0, atol=1e-6)
        current = after


@pytest.mark.parametrize("case", CASES)
def test_the_outer_gradient_passes_through_the_inner_step(case, double):
    args, learner = small(case)
    pre, post, params = random_batch(1), random_batch(2), learner.parameters()
    policy = lambda graph: rl.adapted_policy(learner, learner.unadapted(3), pre, args, graph)
    features = learner.prefix(learner.theta, post.observations)
    old = tuple(t.detach() for t in rl.distribution(learner, policy(False), features))
    gradient = rl.flat_grad(rl.surrogate(learner, policy(True), post, old).loss, params)
    start = rl.parameters_to_vector(params).detach()
    v = unit_vector(len(start))

    def loss_at(point):
        rl.vector_to_parameters(point, params)
        return rl.surrogate(learner, policy(False), post, old).loss.detach()

    numeric = (loss_at(start + 1e-6 * v) - loss_at(start - 1e-6 * v)) / 2e-6
    # Central differences: error about (1e-6)² from curvature, 1e-16 / 1e-6 from rounding; no ReLU kink lies this close.
    assert abs(numeric - gradient.dot(v)) < 1e-6 * max(1, abs(numeric))


# --- the outer step ---

@pytest.mark.parametrize("case", CASES)
def test_curvature_is_the_hessian_of_the_kl_through_the_inner_step(case, double):
    args, learner = small(case)
    pre, post, params = random_batch(1), random_batch(2), learner.parameters()

    def policy_of_now():
        adapted = rl.adapted_policy(learner, learner.unadapted(3), pre, args, differentiable=True)
        return adapted, rl.distribution(learner, adapted, learner.prefix(learner.theta, post.observations))

    old = tuple(t.detach() for t in policy_of_now()[1])
    product = rl.fisher_product(learner, pre, post, args)
    start = rl.parameters_to_vector(params).detach()
    v = unit_vector(len(start))
    ours = product(v)

    def gradient_at(point):
        rl.vector_to_parameters(point, params)
        return rl.flat_grad(rl.surrogate(learner, policy_of_now()[0], post, old).kl, params).detach()

    numeric = (gradient_at(start + 1e-5 * v) - gradient_at(start - 1e-5 * v)) / 2e-5
    # Central differences err by (1e-5)² times the KL's fourth derivative, and by 1e-16 / 1e-5 from rounding.
    assert (numeric - ours).norm() < 1e-5 * numeric.norm()


def test_conjugate_gradient_solves_a_known_system(double):
    root = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    matrix, solution = root @ root.T + torch.eye(6), torch.arange(1.0, 7.0)
    found = rl.conjugate_gradient(lambda v: matrix @ v, matrix @ solution, iterations=20)
    assert torch.allclose(found, solution, rtol=0, atol=1e-5)                  # residual below sqrt(1e-10)
    steps = []
    rl.conjugate_gradient(lambda v: steps.append(1) or matrix @ v, matrix @ solution, iterations=3)
    assert len(steps) == 3


def quadratic_trial(x, sign):
    """A loss with slope `sign`, and a KL that is twice what the curvature below says."""
    return lambda: rl.Trial(sign * x.detach().sum(), x.detach().square().sum())


def test_the_outer_step_keeps_the_kl_bound(double):
    args, x = rl.parse_flags(["--damping", "0", "--max-kl", "0.01"]), torch.nn.Parameter(torch.zeros(4))
    kl, trials = rl.trpo_step([x], torch.ones(4), 0.0, lambda v: v, quadratic_trial(x, 1.0), args)
    assert trials == 3 and kl <= args.max_kl                                   # 0.02, then 0.8² and 0.8⁴ of it
    assert kl == pytest.approx(0.02 * 0.8**4, rel=1e-9)                        # float64 rounding
    assert (x < 0).all()


def test_a_context_is_larger_and_moves_further_on_half_cheetah():
    size = lambda *flags: [getattr(rl.parse_flags(list(flags)), name) for name in ("context_size", "inner_lr")]
    assert size("--method", "cavia") == [5, 1.0] and size("--env", "cheetah-dir", *WEIGHTS) == [5, 0.1]
    assert size("--method", "cavia", "--env", "cheetah-vel") == [50, 10.0]
    assert size("--method", "maml") == [5, 0.5] and size("--method", "maml", "--env", "cheetah-dir") == size(*WEIGHTS) == [5, 0.1]
    assert size() == [5, 1.0] and size("--env", "cheetah-dir") == [50, 10.0]
    assert size("--method", "cavia", "--env", "cheetah-dir", "--context-size", "2") == [2, 10.0]


def test_the_kl_bound_grows_with_the_dimensions_of_the_action():
    bound = lambda *flags: rl.parse_flags(list(flags)).max_kl
    assert (bound("--env", "nav"), bound("--env", "cheetah-vel")) == (0.02, 0.06)
    assert bound("--env", "cheetah-dir", "--max-kl", "0.01") == 0.01


def test_an_outer_step_that_fails_leaves_the_parameters(double):
    args, x = rl.parse_flags([]), torch.nn.Parameter(torch.zeros(4))
    assert rl.trpo_step([x], torch.ones(4), 0.0, lambda v: v, quadratic_trial(x, -1.0), args) is None
    assert torch.equal(x, torch.zeros(4))
    assert rl.trpo_step([x], torch.ones(4), 0.0, lambda v: v * math.nan, quadratic_trial(x, 1.0), args) is None


# --- environments ---

def test_navigation_follows_its_rules():
    env = rl.Navigation(rl.parse_flags(["--action-scale", "0.5"]), torch.device("cpu"))
    assert torch.equal(env.reset(torch.tensor([[0.3, 0.0], [0.1, -0.1]]), 1, None), torch.zeros(2, 1, 2))
    position, reward, done = env.step(torch.tensor([[[0.1, 0.0]], [[9.0, -9.0]]]))         # 0.05, and the limit 0.1
    assert torch.allclose(position, torch.tensor([[[0.05, 0.0]], [[0.1, -0.1]]]))
    assert torch.allclose(reward, torch.tensor([[-0.25], [0.0]])) and done.tolist() == [[False], [True]]
    goals = env.sample_tasks(1000, torch.Generator().manual_seed(0))
    assert goals.abs().max() <= 0.5 and goals.abs().max() > 0.49


def test_end_points_tell_direction_from_distance():
    """Four tasks whose roll-outs all end at radius 0.3 in the goal's direction, wherever the goal is."""
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.6, -0.8]])
    goals = directions * torch.tensor([[0.1], [0.2], [0.4], [0.5]])
    noise = torch.tensor([0.01, -0.01]).view(1, 2, 1)                       # two roll-outs a task, around 0.3
    path = torch.stack([torch.zeros(4, 2, 2), directions.unsqueeze(1) * (0.3 + noise), torch.full((4, 2, 2), 9.0)], 2)
    mask = torch.tensor([1.0, 1.0, 0.0]).expand(4, 2, 3)                    # the step at 9 is after the end
    found = rl.end_points(goals, rl.Rollouts(path, path, mask, mask))
    assert found["median_cosine"] == pytest.approx(1) and found["end_radius"] == pytest.approx([0.3, 0], abs=1e-6)
    assert found["goal_radius"][0] == pytest.approx(0.3)
    moved = path + 0.5 * goals.view(4, 1, 1, 2)
    assert rl.end_points(goals, rl.Rollouts(moved, path, mask, mask))["radius_correlation"] == pytest.approx(1)


def test_a_rollout_counts_until_its_end():
    args, learner = small("maml")
    env = rl.Navigation(args, torch.device("cpu"))
    goal = torch.tensor([[0.0, 0.0]])                    # a walk of sigma 0.07 that starts here comes back now and then
    rng = torch.Generator().manual_seed(0)
    rollouts = rl.collect(env, goal, learner, learner.unadapted(1), 200, rng, "x", Path("x"))
    ended = rollouts.mask[0, :, -1] == 0
    assert ended.any() and not ended.all()
    lengths = rollouts.mask[0].sum(1).long()
    for r in range(200):
        n = int(lengths[r])
        assert (rollouts.rewards[0, r, n:] == 0).all() and (rollouts.rewards[0, r, :n] < 0).all()
        if n < 100:
            assert rollouts.rewards[0, r, n - 1] > -0.0142                     # inside the square of half-side 0.01


@needs_cheetah
@pytest.mark.parametrize("simulator", ["BatchSimulator", "LoopSimulator"])
def test_half_cheetah_equals_gymnasium_step_by_step(simulator, monkeypatch):
    pytest.importorskip("imageio", reason="gymnasium.envs.mujoco imports imageio")
    import gymnasium
    if simulator == "BatchSimulator" and importlib.util.find_spec("mujoco.batch") is None:
        pytest.skip("this mujoco has no mujoco.batch (3.17 and later)")
    monkeypatch.setattr(rl, "make_simulator", lambda model, count, threads: getattr(rl, simulator)(
        *((model, count, threads) if simulator == "BatchSimulator" else (model, count))))
    args = rl.parse_flags(["--env", "cheetah-dir", "--threads", "1"])
    env = rl.HalfCheetah(args, torch.device("cpu"))
    with rl.no_mujoco_warnings():
        theirs = gymnasium.make("HalfCheetah-v5").unwrapped
    rng = torch.Generator().manual_seed(0)
    observation = env.reset(torch.tensor([[1.0], [-1.0]]), 2, rng)
    theirs.reset(seed=0)
    theirs.set_state(env.simulator.qpos[2].copy(), env.simulator.qvel[2].copy())
    for _ in range(30):
        actions = 1.5 * torch.randn(2, 2, 6, generator=rng)                    # some are clipped
        observation, reward, done = env.step(actions)
        clipped = actions[1, 0].clamp(-1, 1).double().numpy()
        seen, _, _, _, info = theirs.step(clipped)
        torso = theirs.data.body("torso").xpos
        # The simulation is the same float64 arithmetic; observations are then rounded to float32.
        assert np.array_equal(observation[1, 0].numpy(), np.concatenate([seen, torso]).astype(np.float32))
        expected = -info["x_velocity"] - 0.05 * np.square(clipped).sum()       # task 1 runs backwards
        assert float(reward[1, 0]) == pytest.approx(expected, rel=1e-5, abs=1e-6)     # float32 reward
        assert not done.any()


@needs_cheetah
def test_half_of_the_cheetahs_run_each_way():
    env = rl.HalfCheetah(rl.parse_flags(["--env", "cheetah-dir", "--threads", "1"]), torch.device("cpu"))
    draws = [env.sample_tasks(4, torch.Generator().manual_seed(seed)).flatten() for seed in range(20)]
    assert all(sorted(draw.tolist()) == [-1, -1, 1, 1] for draw in draws)
    assert len({tuple(draw.tolist()) for draw in draws}) > 2                   # in random order


@needs_cheetah
def test_half_cheetah_velocity_rewards_the_distance_to_the_target():
    args = rl.parse_flags(["--env", "cheetah-vel", "--threads", "1"])
    env = rl.HalfCheetah(args, torch.device("cpu"))
    tasks = env.sample_tasks(500, torch.Generator().manual_seed(0))
    assert 0 <= tasks.min() < 0.1 and 1.9 < tasks.max() <= 2
    few = env.sample_tasks(4, torch.Generator().manual_seed(1)).flatten()      # one in each quarter, in random order
    assert sorted((few * 2).long().tolist()) == [0, 1, 2, 3] and not few.equal(few.sort().values)
    env.reset(tasks[:2], 1, torch.Generator().manual_seed(0))
    before = env.simulator.qpos[:, 0].copy()
    _, reward, _ = env.step(torch.full((2, 1, 6), 0.5))
    velocity = (env.simulator.qpos[:, 0] - before) / 0.05
    expected = -np.abs(velocity - tasks[:2, 0].numpy()) - 0.05 * 6 * 0.25
    assert np.allclose(reward[:, 0], expected, rtol=0, atol=1e-6)              # float32


def test_a_missing_mujoco_is_one_line_with_the_command(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install mujoco gymnasium"):
        rl.HalfCheetah(rl.parse_flags(["--env", "cheetah-dir"]), torch.device("cpu"))


# --- the script ---

@pytest.fixture(scope="module")
def complete_run(tmp_path_factory):
    return runs.complete("train_rl.py", *TINY, home=tmp_path_factory.mktemp("rl"))[0]


def test_a_run_is_complete(complete_run):
    files = {path.name for path in complete_run.iterdir()}
    assert files >= {"config.json", "log.jsonl", "checkpoint.pt", "result.json", "curves.png", "trajectories.png"}
    result = runs.result(complete_run)
    assert len(result["returns"]) == len(result["returns_ci95"]) == 4 and result["value"] == result["returns"][1]
    assert result["iterations"] == 4 and result["tasks"] == 5 and result["env_steps"] == 4 * 2 * 9 * 100
    lines = read_log(complete_run)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    assert all(0 <= line["kl"] <= result["config"]["max_kl"] == 0.02 for line in lines)
    assert result["skipped"] == lines[-1]["skipped"] == sum(line["kl"] == 0 for line in lines)


def run_main(*flags):
    rl.main([*TINY, *map(str, flags)])


def test_interrupted_and_extended_runs_end_at_the_same_numbers(complete_run, tmp_path):
    """Two steps, killed in the third, resumed to the end: the seeded log and weights of a run without interruption."""
    run = tmp_path / "run"
    runs.interrupt(signal.SIGKILL, "train_rl.py", *TINY, "--iterations", 100_000, out=run, log_lines=2)
    done = torch.load(run / "checkpoint.pt", weights_only=True)["now"]["iteration"]
    run_main("--out", run, "--resume", "--iterations", max(done + 1, 4))
    ours, theirs = ((folder / "log.jsonl").read_text().splitlines() for folder in (run, complete_run))
    assert ours[:4] == theirs
    if done < 4:
        assert all(torch.equal(t, runs.weights(run)[name]) for name, t in runs.weights(complete_run).items())


@pytest.mark.parametrize("method", ["maml", "cavia"])
def test_the_baselines_run_and_repeat_exactly(method, tmp_path):
    flags = ["--method", method, "--iterations", 2]
    for folder in ("a", "b"):
        run_main(*flags, "--out", tmp_path / folder)
    assert (tmp_path / "a/log.jsonl").read_text() == (tmp_path / "b/log.jsonl").read_text()
    result = runs.result(tmp_path / "a")
    assert len(set(result["returns"])) == 4                                    # every update changes the policy


@needs_cheetah
def test_half_cheetah_runs_and_repeats_exactly(tmp_path):
    for folder in ("a", "b"):
        run_main("--env", "cheetah-vel", "--iterations", 2, "--test-tasks", 2, "--out", tmp_path / folder)
    assert (tmp_path / "a/log.jsonl").read_text() == (tmp_path / "b/log.jsonl").read_text()


def test_the_evaluation_may_take_more_roll_outs_than_training():
    args = rl.parse_flags([*TINY, "--test-rollouts", "7"])
    env = rl.Navigation(args, torch.device("cpu"))
    learner = rl.build_learner(args, env, torch.device("cpu"))
    _, stages = rl.evaluate(learner, env, args, Path("nowhere"))
    assert [stage.rewards.shape[:2] for stage in stages] == [(5, 7)] * 4             # before and after three updates
    assert rl.parse_flags(TINY).test_rollouts == 3


@needs_cheetah
def test_the_diagnosis_measures_noise_outer_steps_and_a_told_policy(tmp_path):
    """results/rl/diagnose.py on a run of two iterations; parts are added to its file one by one."""
    run, kept = tmp_path / "maml", tmp_path / "diagnosis.json"
    run_main("--env", "cheetah-dir", "--method", "maml", "--iterations", 2, "--out", run)
    weights = (run / "checkpoint.pt").read_bytes()
    spec = importlib.util.spec_from_file_location("diagnose", runs.ROOT / "results/rl/diagnose.py")
    diagnose = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(diagnose)
    for flags in (["noise", run], ["outer", run, "--repeats", 2], ["told", "--smoke", "--iterations", 2]):
        diagnose.main([*map(str, flags), "--json", str(kept)])
    found = json.loads(kept.read_text())
    noise, outer, told = found["noise maml"], found["outer maml"], found["told-seed1"]
    assert noise["iterations"] == outer["iterations"] == 2
    assert noise["noise_over_mean"] > 0.5                     # three roll-outs: an update is mostly noise
    assert noise["own_update"] != noise["mean_update"]
    assert outer["gain_own"][0] >= 0                          # the line search sees to it
    assert outer["gain_own"] != outer["gain_fresh"]
    assert len(told["after"]) == 2 and told["forwards"] != told["backwards"]
    assert (run / "checkpoint.pt").read_bytes() == weights
    with pytest.raises(UsageError, match="no checkpoint.pt"):
        diagnose.main(["noise", str(runs.ROOT / "results/rl/nav-maml-seed1")])
    assert rl.adapted_policy.__module__ == "train_rl"         # the told policy's stand-in is gone


@needs_cheetah
@pytest.mark.filterwarnings("ignore")      # glfw warns that there is no display
@pytest.mark.parametrize("kind", ["gif", "mp4"])
def test_a_film_is_made_or_its_absence_explained(kind, tmp_path):
    """In a process of its own, as MUJOCO_GL is read once: a run of one short iteration, filmed before and after its update."""
    if kind == "mp4" and not importlib.util.find_spec("imageio_ffmpeg"):
        pytest.skip("imageio-ffmpeg is not installed")
    film = tmp_path / f"film.{kind}"
    flags = [*TINY, "--env", "cheetah-dir", "--iterations", "1", "--test-tasks", "2", "--render", str(film)]
    program = "import sys, train_rl; train_rl.HalfCheetah.horizon = 20; train_rl.main(sys.argv[1:])"
    done = subprocess.run([sys.executable, "-c", program, *flags, "--out", str(tmp_path / "run")], cwd=runs.ROOT,
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    if "no film" in done.stdout:
        assert "OpenGL" in done.stdout and "MUJOCO_GL" in done.stdout
    elif kind == "gif":
        with Image.open(film) as gif:
            assert gif.n_frames > 1 and gif.size == (480, 176)      # two views side by side
            assert len(set(gif.convert("L").getdata())) > 10        # something is to be seen
    else:
        assert b"ftyp" in film.read_bytes()[:16]


@pytest.mark.parametrize("method", ["modgrad", "maml", "cavia"])
@pytest.mark.parametrize("hidden", [True, False])
def test_a_policy_sees_the_place_along_the_track_unless_it_is_hidden(method, hidden):
    args = rl.parse_flags(["--env", "cheetah-dir", "--method", method, "--hidden", "8", *["--hide-x"] * hidden])
    learner = rl.build_learner(args, rl.HalfCheetah, torch.device("cpu"))
    here = torch.randn(2, 5, 20)
    there = here.index_add(2, torch.tensor([17]), torch.ones(2, 5, 1))                # a metre further, nothing else
    output = lambda o: rl.distribution(learner, learner.unadapted(2), learner.prefix(learner.theta, o))[0]
    assert torch.equal(output(here), output(there)) == hidden


def test_navigation_leaves_mujoco_alone_and_the_benchmark_counts_steps():
    code = f"import sys, train_rl; train_rl.main({TINY + ['--benchmark']}); assert 'mujoco' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=runs.ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "environment steps per CPU second" in done.stdout


@pytest.mark.parametrize("flags, message", [
    (["--env", "moon"], "moon"),
    (["--adapt", "fc9.weight"], "fc9.weight"),
    (["--method", "cavia", "--adapt", "fc1.weight"], "cavia"),
    (["--adapt", "log_std"], "log_std alone"),
    (["--method", "maml", "--adapt", "context"], "maml has none"),
    (["--adapt", "context", "fc1.bias"], "context"),
    (["--method", "maml", "--normalise-context"], "--normalise-context"),
    (["--method", "maml", "--context-size", "3"], "--context-size is for --adapt context"),
    (["--adapt", "fc1.weight", "--context-size", "3"], "--context-size is for --adapt context"),
    (["--render", "film.gif"], "--render"),
    (["--env", "cheetah-dir", "--render", "film.avi"], ".mp4"),
    (["--env", "nav", "--hide-x"], "--hide-x"),
    (["--rollouts", "0"], "rollouts"),
    (["--gamma", "5"], "'5' is not a number of 0 to 1"),
    (["--gae-lambda", "1.1"], "'1.1' is not a number of 0 to 1"),
    (["--test-tasks", "1"], "'1' is not an integer of at least 2"),
    (["--kernel", "triton", "--device", "cpu"], "triton"),
])
def test_bad_flags_are_refused(flags, message, tmp_path, capsys):
    with pytest.raises((UsageError, SystemExit)) as caught:
        run_main(*flags, "--out", tmp_path / "run")
    text = capsys.readouterr().err if isinstance(caught.value, SystemExit) else str(caught.value)
    assert message in text.splitlines()[-1] and not (tmp_path / "run").exists()
    assert getattr(caught.value, "code", 2) == 2


def test_a_run_is_not_resumed_with_other_settings(complete_run):
    with pytest.raises(UsageError, match="inner_lr"):
        run_main("--out", complete_run, "--resume", "--inner-lr", 0.7)
    with pytest.raises(UsageError, match="--resume"):
        run_main("--out", complete_run)


def test_a_reward_that_is_not_finite_names_its_step_and_task_and_keeps_the_checkpoint(tmp_path, monkeypatch):
    step, calls = rl.Navigation.step, []

    def broken(self, actions):
        calls.append(1)
        position, reward, done = step(self, actions)
        if len(calls) == 200 + 38:                                             # iteration 2, before the update, step 37
            reward[2, 1] = math.nan
        return position, reward, done

    monkeypatch.setattr(rl.Navigation, "step", broken)
    with pytest.raises(UsageError, match="iteration 2, task 2, step 37.*checkpoint.pt"):
        run_main("--out", tmp_path / "run")
    assert torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)["now"]["iteration"] == 1
    assert not (tmp_path / "run/result.json").exists()


def test_every_method_and_seed_meets_the_same_evaluation_tasks():
    tasks = []
    for flags in (["--method", "modgrad"], ["--method", "cavia", "--seed", "7"]):
        args = rl.parse_flags([*TINY, *flags, "--updates", "1"])
        env = rl.Navigation(args, torch.device("cpu"))
        tasks.append(rl.evaluate(rl.build_learner(args, env, torch.device("cpu")), env, args, Path("x"))[0])
    assert torch.equal(*tasks) and len(tasks[0]) == 5
