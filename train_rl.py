"""Meta-reinforcement learning: 2D navigation and MuJoCo half-cheetah (Fig. 8 of the paper).

    python train_rl.py --env nav --method modgrad

is the paper's first panel: after one policy-gradient step on 20 roll-outs of a new task, ModGrad's return is about -8,
CAVIA's and MAML's about -15. Half-cheetah direction (about 590, the others below 550) and velocity (-80, -90, -100) are
--env cheetah-dir and cheetah-vel, which need `pip install mujoco gymnasium`; navigation needs nothing.

Shapes: T tasks, R roll-outs of a task, H steps of a roll-out, N = R H steps of a task, o and a sizes of observation and
action.

DEVIATION: the paper's form of ModGrad for this experiment is in a supplement that is not public. Here the inner step
is on a context that joins the observation, as CAVIA's, and its policy gradient is modulated as everywhere else, with nu
from the same roll-outs (Eq. 9), divided by its root mean square; TRPO takes the outer step on theta and psi together.
This form reproduces the paper's -8 on navigation; modulating the policy's weights instead (--adapt fc1.weight ...) does
not, and without the division nu is so small that M stays 1 (results/rl).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from common import (HelpFormatter, Training, UsageError, add_run_flags, append_log, check_finite, copy_weights, fill_in,
                    load_weights, mean_ci95, non_negative_float, open_run, parse_run, plot_log, positive_float, positive_int,
                    progress, run_main, save_atomically, setup, several_int, share_float, write_result)
from kernels import resolve_backend
from modgrad import Chain, Generator, Stage, Tensors, adapt, mlp

# --- flags -----------------------------------------------------------------------------------------------------------

EVALUATION_SEED = 20200823      # of test tasks and their noise: the same for every run, so that results compare
LAYERS = [f"fc{k}.{kind}" for k in (1, 2, 3) for kind in ("weight", "bias")]
ADAPT = {"modgrad": ["context"], "maml": [*LAYERS, "log_std"], "cavia": ["context"]}
WEIGHTS = {"inner_lr": 0.1, "context_size": 5}              # defaults where weights are adapted,
MAML_ON_NAV = {"inner_lr": 0.5, "context_size": 5}          # but MAML's on navigation, its own code's,
CONTEXT = {"inner_lr": 1.0, "context_size": 5}              # a context on navigation, a context on half-cheetah: there
CHEETAH_CONTEXT = {"inner_lr": 10.0, "context_size": 50}    # CAVIA needs more than 5 and 1; public MuJoCo forks have these
EXTENSIBLE = {"iterations", "test_tasks", "test_rollouts", "updates", "later_rate", "render"}   # no training step needs them
SMOKE = {"iterations": 4, "meta_batch": 4, "rollouts": 5, "test_tasks": 6, "context_dim": 16, "log_every": 1,
         "checkpoint_every": 2}


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    task = parser.add_argument_group("task")
    task.add_argument("--env", choices=tuple(ENVIRONMENTS), default="nav", help="the family of tasks")
    task.add_argument("--rollouts", type=positive_int, default=20, help="R, roll-outs per update of a task (paper: 20)")
    task.add_argument("--action-scale", type=positive_float,
                      help="multiplies the policy's actions before they are clipped (default: nav 0.1, as in MAML's "
                           "code: the range is 0.1, so that sigma 1 would saturate it and hide the mean; cheetah 1)")
    task.add_argument("--hide-x", action="store_true",
                      help="half-cheetah: hide the torso's place along the track from the policy, as Gym's own observation "
                           "does; CAVIA's has it, and a policy that runs farther than ever before meets values it never saw")

    method = parser.add_argument_group("method")
    method.add_argument("--method", choices=tuple(ADAPT), default="modgrad", help="the meta-learner")
    method.add_argument("--hidden", type=positive_int, default=100, help="width of both hidden layers (paper: 100)")
    method.add_argument("--init-std", type=positive_float, default=1.0,
                        help="sigma of the Gaussian policy at the start, before --action-scale (CAVIA's code: 1)")
    method.add_argument("--inner-lr", type=positive_float,
                        help="alpha (default: 0.1, maml on nav 0.5; of a context 1, and 10 on half-cheetah)")
    method.add_argument("--adapt", nargs="+", metavar="NAME", help="tensors that the inner step changes: weights, "
                        "biases and log_std (maml: all of them), or context, numbers that join the observation and are 0 "
                        "before the inner step (cavia, and modgrad, which modulates their gradient)")
    method.add_argument("--context-size", type=positive_int,
                        help="numbers of that context (default: 5, as in CAVIA's README; 50 on half-cheetah)")
    method.add_argument("--rank", type=positive_int, default=5, help="u, columns per sister network (paper: 5)")
    method.add_argument("--context-dim", type=positive_int, default=32, help="D, length of ModGrad's nu")
    method.add_argument("--hidden-cap", type=positive_int, default=256, help="largest hidden layer of a sister network")
    method.add_argument("--init", choices=("identity", "released"), default="identity",
                        help="M at the start of training: 1 (MAML), or PyTorch's default layers (near 0)")
    method.add_argument("--normalise-context", action=argparse.BooleanOptionalAction, default=None,
                        help="modgrad: divide nu by its root mean square; without it psi hardly learns on nav (default: on)")
    method.add_argument("--gamma", type=share_float, default=0.95, help="discount (CAVIA's code: 0.95)")
    method.add_argument("--gae-lambda", type=share_float, default=1.0, help="lambda of GAE (CAVIA's code: 1)")
    method.add_argument("--kernel", choices=("auto", "triton", "closed", "eager"), default="auto",
                        help="the modulated update: auto is Triton on CUDA, closed forms on the CPU")

    train = parser.add_argument_group("meta-training")
    train.add_argument("--iterations", type=positive_int, default=500, help="outer TRPO steps (CAVIA's code: 500)")
    train.add_argument("--meta-batch", type=positive_int, default=20, help="T, tasks per outer step (CAVIA's code: 20)")
    train.add_argument("--max-kl", type=positive_float,
                       help="bound on an outer step's KL, the mean over states (default: 0.01 per dimension of the action, as "
                            "CAVIA's code averages over them: nav 0.02, cheetah 0.06, where 0.01 learns far slower)")
    train.add_argument("--cg-iterations", type=positive_int, default=10, help="of conjugate gradient")
    train.add_argument("--damping", type=non_negative_float, default=1e-5, help="added to the curvature")
    train.add_argument("--curvature-stride", type=positive_int, default=10,
                       help="the curvature is taken on every so many-th step of a roll-out: neighbouring states are "
                            "alike, and the line search tests the KL on all of them (1: all, three times the time)")
    train.add_argument("--line-search", type=positive_int, default=15, help="trials, each 0.8 of the one before")
    train.add_argument("--log-every", type=positive_int, default=1, help="iterations per line of log.jsonl")
    train.add_argument("--checkpoint-every", type=positive_int, default=10, help="iterations between checkpoints")

    test = parser.add_argument_group("test")
    test.add_argument("--test-tasks", type=several_int, default=40, help="fresh tasks to evaluate (MAML's code: 40)")
    test.add_argument("--test-rollouts", type=positive_int,
                      help="R of the evaluation, for the updates and the returns (default: --rollouts); more of them show "
                           "what the noise of the inner gradient costs")
    test.add_argument("--updates", type=positive_int, default=3, help="updates shown, each on its own roll-outs")
    test.add_argument("--later-rate", type=positive_float, default=0.5,
                      help="alpha is times this for the updates after the first, not trained for (MAML's code: 0.5)")
    test.add_argument("--render", metavar="FILE", help="film a cheetah before and after an update, into a .gif or .mp4 "
                      "(needs a working OpenGL; with --resume a finished run is filmed)")
    test.add_argument("--benchmark", action="store_true",
                      help="only measure environment steps per second, beside gymnasium's vector environment")
    test.add_argument("--smoke", action="store_true", help="a complete tiny run in under a minute")
    add_run_flags(parser)
    return complete(parse_run(parser, argv, lambda given: SMOKE, unread))


def unread(args: argparse.Namespace) -> dict:
    """Flags that method and adapted tensors do not read: {whose they are: names}."""
    has_context = (args.adapt or ADAPT[args.method]) == ["context"]
    return {} if has_context else {"for --adapt context": ["context_size"]}


def complete(args: argparse.Namespace) -> argparse.Namespace:
    """Fill in what depends on the method, the environment or --smoke, and refuse combinations that mean nothing."""
    args.adapt = args.adapt or ADAPT[args.method]
    has_context = args.adapt == ["context"]
    if has_context:
        fill_in(args, CONTEXT if args.env == "nav" else CHEETAH_CONTEXT)
    else:
        fill_in(args, MAML_ON_NAV if (args.method, args.env) == ("maml", "nav") else WEIGHTS)
    if args.normalise_context is None:
        args.normalise_context = args.method == "modgrad"
    if args.normalise_context and args.method != "modgrad":
        raise UsageError(f"--normalise-context is about modgrad's nu; {args.method} has none")
    if args.action_scale is None:
        args.action_scale = 0.1 if args.env == "nav" else 1.0
    if args.max_kl is None:
        args.max_kl = 0.01 * ENVIRONMENTS[args.env].action
    if (args.method == "cavia" and not has_context) or (has_context and args.method == "maml"):
        raise UsageError(f"--adapt {' '.join(args.adapt)} with --method {args.method}: cavia changes its context and "
                         "nothing else, modgrad may do so, and maml has none")
    if args.adapt == ["log_std"]:
        raise UsageError("--adapt log_std alone would not change what the policy does on average: name a layer too")
    if args.hide_x and args.env == "nav":
        raise UsageError("--hide-x is about half-cheetah's observation; navigation has no torso")
    if args.render and (args.env == "nav" or not args.render.endswith((".gif", ".mp4"))):
        raise UsageError("--render films a cheetah into a file that ends in .gif or .mp4; navigation draws trajectories.png")
    if args.render and args.render.endswith(".mp4") and not importlib.util.find_spec("imageio_ffmpeg"):
        raise UsageError("--render needs imageio-ffmpeg for .mp4: pip install imageio-ffmpeg, or name a .gif")
    args.test_rollouts = args.test_rollouts or args.rollouts
    args.out = args.out or f"runs/rl/{args.env}-{args.method}-seed{args.seed}{'-smoke' * args.smoke}"
    return args


# --- environments ----------------------------------------------------------------------------------------------------
# All tasks and roll-outs move in lock-step. An environment has sizes (observation, action, horizon) and
# sample_tasks(count, rng) -> (T, k); reset(tasks, R, rng) -> (T, R, o); step(actions (T, R, a)) -> observation,
# reward (T, R), done (T, R). Random numbers come from one CPU generator: the same tasks and noise on every device.

class Navigation:
    """A point in the plane walks from the origin to a goal in [-0.5, 0.5]² that it does not observe.

    Reward: minus the distance after the move, at most 0.1 per coordinate. A roll-out ends when both coordinates are
    within 0.01 of the goal, or after 100 steps (the rules of CAVIA's code).
    """
    observation, action, horizon = 2, 2, 100

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.scale, self.device = args.action_scale, device

    def sample_tasks(self, count: int, rng: torch.Generator) -> Tensor:
        return (torch.rand(count, 2, generator=rng) - 0.5).to(self.device)

    def reset(self, tasks: Tensor, rollouts: int, rng: torch.Generator) -> Tensor:
        self.goal = tasks.unsqueeze(1)                                                       # (T, 1, 2)
        self.position = torch.zeros(len(tasks), rollouts, 2, device=self.device)
        return self.position

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.position = self.position + (self.scale * actions).clamp(-0.1, 0.1)
        error = self.position - self.goal
        return self.position, -error.norm(dim=-1), (error.abs() < 0.01).all(-1)


INSTALL = "pip install mujoco gymnasium"
DT, SUBSTEPS = 0.05, 5          # seconds of a control step, physics steps in it (Gym's half_cheetah)
TORSO_X = 17                    # index in the observation of the torso's x, which is the root's


class HalfCheetah:
    """MuJoCo's half-cheetah in Gym's half_cheetah.xml, 200 steps, without an early end (the rules of CAVIA's code).

    Task: direction d in {-1, 1}, reward d v - 0.05 |a|²; or velocity g in [0, 2], reward -|v - g| - 0.05 |a|²; v is the
    root's mean velocity over the step. Observation: positions without the root's x (8), velocities (9), torso (3).
    """
    observation, action, horizon = 20, 6, 200

    def __init__(self, args: argparse.Namespace, device: torch.device):
        self.model = load_cheetah()
        self.direction, self.scale, self.device = args.env == "cheetah-dir", args.action_scale, device
        self.threads, self.simulator, self.size = args.threads or 0, None, 0

    def sample_tasks(self, count: int, rng: torch.Generator) -> Tensor:
        # DEVIATION: uniform draws (CAVIA's code) made one per slice of the range, in random order: half of the tasks run
        # forwards. Four tasks of the same direction would teach the policy to run that way before it has seen a task.
        slices = torch.randperm(count, generator=rng).unsqueeze(1)
        draw = (slices + torch.rand(count, 1, generator=rng)) / count
        return (torch.where(draw < 0.5, -1.0, 1.0) if self.direction else 2 * draw).to(self.device)

    def reset(self, tasks: Tensor, rollouts: int, rng: torch.Generator) -> Tensor:
        self.tasks, self.shape, count = tasks, (len(tasks), rollouts), len(tasks) * rollouts
        if count != self.size:
            self.simulator, self.size = make_simulator(self.model, count, self.threads), count
        position = 0.2 * torch.rand(count, 9, generator=rng, dtype=torch.float64) - 0.1
        velocity = 0.1 * torch.randn(count, 9, generator=rng, dtype=torch.float64)
        self.simulator.reset(self.model.qpos0 + position.numpy(), velocity.numpy())
        return self._observe()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        control = (self.scale * actions).clamp(-1, 1)                                        # (T, R, 6)
        before = self.simulator.qpos[:, 0].copy()
        self.simulator.step(control.flatten(0, 1).double().cpu().numpy())
        velocity = self._tensor((self.simulator.qpos[:, 0] - before) / DT)
        effort = 0.05 * control.square().sum(-1)
        reward = self.tasks * velocity if self.direction else -(velocity - self.tasks).abs()
        return self._observe(), reward - effort, torch.zeros(self.shape, dtype=torch.bool, device=self.device)

    def _observe(self) -> Tensor:
        s = self.simulator
        return self._tensor(np.concatenate([s.qpos[:, 1:], s.qvel, s.torso], axis=1))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).float().unflatten(0, self.shape).to(self.device)


def load_cheetah():
    """The MjModel of Gym's half-cheetah; its file is read without importing gymnasium's environments."""
    gymnasium = importlib.util.find_spec("gymnasium")
    if gymnasium is None or importlib.util.find_spec("mujoco") is None:
        raise UsageError(f"half-cheetah needs MuJoCo and Gymnasium's model file: {INSTALL}")
    import mujoco
    with no_mujoco_warnings():
        return mujoco.MjModel.from_xml_path(str(Path(gymnasium.origin).parent / "envs/mujoco/assets/half_cheetah.xml"))


@contextlib.contextmanager
def no_mujoco_warnings() -> Iterator[None]:
    """mujoco 4 says at every reading of the model that its settotalmass is deprecated, also into MUJOCO_LOG.TXT."""
    import mujoco
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(None)


def make_simulator(model, count: int, threads: int) -> BatchSimulator | LoopSimulator:
    """The fast simulator where mujoco has it (3.17 and later), else the loop; both are bit-identical to Gymnasium's."""
    if importlib.util.find_spec("mujoco.batch") is None:
        return LoopSimulator(model, count)
    return BatchSimulator(model, count, threads)


class BatchSimulator:
    """`count` cheetahs on C++ threads; qpos, qvel (count, 9) and torso (count, 3) are live float64 arrays."""

    def __init__(self, model, count: int, threads: int):
        from mujoco import batch, mjtStage
        self.batch, self.stages = batch.Batch(model, count, threads), mjtStage
        self.qpos, self.qvel, self.control = (self.batch.bind(name) for name in ("qpos", "qvel", "ctrl"))
        self.torso = self.batch.bind("xpos")[:, 1]

    def reset(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        self.batch.reset(stage=self.stages.mjSTAGE_NONE)
        self.qpos[:], self.qvel[:] = qpos, qvel
        self.batch.forward(stage=self.stages.mjSTAGE_POS)      # the torso's place; later states do not depend on it

    def step(self, control: np.ndarray) -> None:
        self.control[:] = control
        self.batch.step(nstep=SUBSTEPS)


class LoopSimulator:
    """The same through one MjData per cheetah, for any mujoco; a quarter slower and on one thread."""

    def __init__(self, model, count: int):
        import mujoco
        self.mujoco, self.model = mujoco, model
        self.data = [mujoco.MjData(model) for _ in range(count)]
        self.qpos, self.qvel, self.torso = np.empty((count, 9)), np.empty((count, 9)), np.empty((count, 3))

    def reset(self, qpos: np.ndarray, qvel: np.ndarray) -> None:
        for data, q, v in zip(self.data, qpos, qvel):
            self.mujoco.mj_resetData(self.model, data)
            data.qpos[:], data.qvel[:] = q, v
            self.mujoco.mj_fwdPosition(self.model, data)
        self._read()

    def step(self, control: np.ndarray) -> None:
        for data, row in zip(self.data, control):
            data.ctrl[:] = row
            self.mujoco.mj_step(self.model, data, nstep=SUBSTEPS)
        self._read()

    def _read(self) -> None:
        for k, data in enumerate(self.data):
            self.qpos[k], self.qvel[k], self.torso[k] = data.qpos, data.qvel, data.xpos[1]


ENVIRONMENTS = {"nav": Navigation, "cheetah-dir": HalfCheetah, "cheetah-vel": HalfCheetah}


class Rollouts(NamedTuple):
    """What the policy saw, did and got; `mask` is 1 for steps before the end of a roll-out, 0 after."""
    observations: Tensor    # (T, R, H, o)
    actions: Tensor         # (T, R, H, a), before scaling and clipping
    rewards: Tensor         # (T, R, H), 0 after the end
    mask: Tensor            # (T, R, H)

    def returns(self) -> Tensor:
        """Undiscounted return of each task, the mean over its roll-outs: (T,)."""
        return self.rewards.sum(-1).mean(1)


@torch.no_grad()
def collect(env, tasks: Tensor, learner: Learner, adapted: Tensors, rollouts: int, rng: torch.Generator, where: str,
            run: Path) -> Rollouts:
    """R roll-outs of each task, the policy of task t reading slice t of `adapted`. Raises UsageError for a non-finite
    reward or state, naming task and step."""
    count, horizon = len(tasks), env.horizon
    noise = torch.randn(horizon, count, rollouts, env.action, generator=rng).to(tasks.device)
    observation, alive = env.reset(tasks, rollouts, rng), torch.ones(count, rollouts, device=tasks.device)
    record = []
    for t in range(horizon):
        mean, log_std = distribution(learner, adapted, learner.prefix(learner.theta, observation))
        action = mean + log_std.exp() * noise[t]
        following, reward, done = env.step(action)
        record.append((observation, action, reward * alive, alive))
        observation, alive = following, alive * ~done
    result = Rollouts(*(torch.stack(part, 2) for part in zip(*record)))
    check_rollouts(result, where, run)
    return result


def check_rollouts(rollouts: Rollouts, where: str, run: Path) -> None:
    sums = rollouts.rewards + rollouts.observations.sum(-1)              # a NaN or infinity of a step shows in its sum
    bad = (~sums.isfinite()).nonzero()
    if len(bad):
        task, rollout, step = bad[bad[:, 2].argmin()].tolist()
        check_finite(float(sums[task, rollout, step]), "reward or state", f"{where}, task {task}, step {step}", run)


# --- policy ----------------------------------------------------------------------------------------------------------

class Learner(NamedTuple):
    """What is meta-learned, and the policy cut where adaptation begins."""
    theta: dict[str, Tensor]        # the layers fc1, fc2, fc3 and log_std (a,)
    start: Tensors                  # where the inner step starts: tensors of theta, or a zero context
    prefix: Chain                   # observations -> features, the same before and after adaptation
    suffix: Chain                   # features -> mean action, reads the adapted tensors
    generator: Generator | None     # psi; None for MAML and CAVIA (M = 1)

    def parameters(self) -> list[Tensor]:
        return [*self.theta.values(), *(self.generator.parameters() if self.generator else ())]

    state, load = copy_weights, load_weights        # state() -> a copy on the CPU, load(state)

    def unadapted(self, tasks: int) -> Tensors:
        """The start of the inner step for every task: {name: (T, *shape)}."""
        return {name: t.expand(tasks, *t.shape) for name, t in self.start.items()}


def build_learner(args: argparse.Namespace, env, device: torch.device) -> Learner:
    """Xavier-uniform layers with zero biases, as in CAVIA's code; a context that is adapted is a further input."""
    extra = args.context_size if args.adapt == ["context"] else 0
    theta, network = mlp([env.observation + extra, args.hidden, args.hidden, env.action])
    for name, t in theta.items():
        nn.init.zeros_(t) if name.endswith("bias") else nn.init.xavier_uniform_(t)
    theta["log_std"] = torch.full((env.action,), math.log(args.init_std))
    theta = {name: nn.Parameter(t.detach().to(device)) for name, t in theta.items()}
    first = []
    if args.hide_x:
        shown = (torch.arange(env.observation, device=device) != TORSO_X).float()
        first.append(Stage((), lambda theta, x, support: x * shown))
    if extra:
        prefix, suffix, start = Chain(first), network, {"context": torch.zeros(extra, device=device)}
    else:
        prefix, suffix = network.split([name for name in args.adapt if name != "log_std"])
        prefix = Chain([*first, *prefix.stages])
        start = {name: theta[name] for name in args.adapt}
    generator = None
    if args.method == "modgrad":
        generator = Generator({name: t.shape for name, t in start.items()}, args.context_dim, args.rank, init=args.init,
                              hidden_cap=args.hidden_cap).to(device)
    return Learner(theta, start, prefix, suffix, generator)


def distribution(learner: Learner, adapted: Tensors, features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (T, N, a) and log-std (T or 1, 1, a) of the Gaussian policy; features (T, N, ...) from `learner.prefix`."""
    params = {**learner.theta, **adapted}
    if "context" in adapted:
        context = adapted["context"].unsqueeze(1).expand(-1, features.shape[1], -1)
        features = torch.cat([features, context], -1)
    log_std = params["log_std"]
    return learner.suffix(params, features), log_std.view(-1, 1, log_std.shape[-1])


# --- task loss -------------------------------------------------------------------------------------------------------

class Batch(NamedTuple):
    """Steps of T tasks as the losses read them."""
    observations: Tensor    # (T, N, o)
    actions: Tensor         # (T, N, a)
    advantages: Tensor      # (T, N), normalised over the steps of each task
    weights: Tensor         # (T, N), sum 1 per task: a mean over the steps of a roll-out, then over roll-outs

    @staticmethod
    def of(rollouts: Rollouts, args: argparse.Namespace) -> Batch:
        values = baseline_values(rollouts, args.gamma)
        advantages = gae(rollouts.rewards, values, rollouts.mask, args.gamma, args.gae_lambda)
        weights = rollouts.mask / rollouts.mask.sum(2, keepdim=True) / rollouts.mask.shape[1]
        flat = lambda t: t.flatten(1, 2)
        return Batch(flat(rollouts.observations), flat(rollouts.actions),
                     normalised(flat(advantages), flat(rollouts.mask)), flat(weights))

    def every(self, stride: int, horizon: int) -> Batch:
        """The steps 0, stride, 2 stride, ... of each roll-out of `horizon` steps; weights sum to 1 again."""
        pick = lambda t: t.unflatten(1, (-1, horizon))[:, :, ::stride].flatten(1, 2)
        thinned = Batch(*map(pick, self))
        return thinned._replace(weights=thinned.weights / thinned.weights.sum(1, keepdim=True))


def baseline_values(rollouts: Rollouts, gamma: float, ridge: float = 1e-5) -> Tensor:
    """Values (T, R, H) of the linear feature baseline, fitted to the discounted returns of the same roll-outs.

    Features [o, o², t, t², t³, 1] with t in steps / 100, one ridge regression per task (Duan et al. 2016, as CAVIA).
    DEVIATION: of the roll-outs after the update too; CAVIA's code keeps for them the fit of those before it.
    Solved in float64: o and its powers are nearly collinear.
    """
    obs, mask = rollouts.observations.double(), rollouts.mask.double().unsqueeze(-1)
    time_ = torch.arange(obs.shape[2], device=obs.device, dtype=obs.dtype).view(-1, 1).expand(*obs.shape[:3], 1) / 100
    features = torch.cat([obs, obs**2, time_, time_**2, time_**3, torch.ones_like(time_)], -1)    # (T, R, H, 2 o + 4)
    targets = discounted(rollouts.rewards.double(), gamma).unsqueeze(-1)
    x, y = (features * mask).flatten(1, 2), targets.flatten(1, 2)       # rows of zeros after the end of a roll-out
    eye = torch.eye(x.shape[-1], device=x.device, dtype=x.dtype)
    weights = torch.linalg.solve(x.mT @ x + ridge * eye, x.mT @ y)                                # (T, 2 o + 4, 1)
    return (features @ weights.unsqueeze(1)).squeeze(-1).to(rollouts.rewards.dtype)


def discounted(values: Tensor, factor: float) -> Tensor:
    """sum_k factor^k values[..., t + k]: (..., H) -> (..., H)."""
    out, running = torch.empty_like(values), torch.zeros_like(values[..., 0])
    for t in reversed(range(values.shape[-1])):
        running = values[..., t] + factor * running
        out[..., t] = running
    return out


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lambda_: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016), all (T, R, H); the value after a roll-out's end is 0."""
    values = values * mask
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    return discounted((rewards + gamma * following - values) * mask, gamma * lambda_)


def normalised(x: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and variance 1 over each task's steps where mask is 1; 0 elsewhere: (T, N)."""
    count = mask.sum(1, keepdim=True)
    centred = (x - (x * mask).sum(1, keepdim=True) / count) * mask
    return centred / ((centred.square().sum(1, keepdim=True) / count).sqrt() + 1e-8)


def log_prob(mean: Tensor, log_std: Tensor, actions: Tensor) -> Tensor:
    """Log-density of the Gaussian policy: (T, N, a) -> (T, N)."""
    z = (actions - mean) * (-log_std).exp()
    return -(0.5 * z.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean0: Tensor, log_std0: Tensor, mean1: Tensor, log_std1: Tensor) -> Tensor:
    """KL(0 || 1) of diagonal Gaussians: (T, N, a) -> (T, N)."""
    variance = (2 * (log_std0 - log_std1)).exp() + ((mean0 - mean1) * (-log_std1).exp()).square()
    return (log_std1 - log_std0 + 0.5 * (variance - 1)).sum(-1)


def adapted_policy(learner: Learner, current: Tensors, batch: Batch, args: argparse.Namespace,
                   differentiable: bool, rate: float = 1.0) -> Tensors:
    """One inner step, of size `rate` alpha, of every task from `current` {name: (T, *shape)} on its own roll-outs."""
    with torch.set_grad_enabled(differentiable):
        features = learner.prefix(learner.theta, batch.observations)

        def loss(adapted: Tensors) -> Tensor:                                                     # (T,)
            likelihood = log_prob(*distribution(learner, adapted, features), batch.actions)
            return -(likelihood * batch.advantages * batch.weights).sum(1)

        return adapt(loss, current, None, rate * args.inner_lr, learner.generator, differentiable=differentiable,
                     normalise_context=args.normalise_context, kernel=args.kernel)


# --- meta-train ------------------------------------------------------------------------------------------------------

def flat_grad(output: Tensor, inputs: list[Tensor], cotangent: Tensor | None = None, keep: bool = True,
              graph: bool = False) -> Tensor:
    """Gradient of `output` (or its product with `cotangent`) with respect to all inputs, as one vector."""
    grads = torch.autograd.grad(output, inputs, cotangent, retain_graph=keep, create_graph=graph, allow_unused=True,
                                materialize_grads=True)
    return torch.cat([g.reshape(-1) for g in grads])


def fisher_product(learner: Learner, pre: Batch, post: Batch, args: argparse.Namespace) -> Callable[[Tensor], Tensor]:
    """v -> H v, H the Hessian at the present parameters of the mean KL between the adapted policies of now and of then.

    There the KL is 0.5 |d z|² to second order, z being the adapted policies' means and log-stds in units of sigma and
    weighted by sqrt(weights / T); so H = JᵀJ, J = dz/d(theta, psi) through the inner step. Jᵀu is linear in u: its
    derivative with respect to u gives J v, and the graphs of both are built once.
    """
    params, tasks = learner.parameters(), len(post.actions)
    adapted = adapted_policy(learner, learner.unadapted(tasks), pre, args, differentiable=True)
    mean, log_std = distribution(learner, adapted, learner.prefix(learner.theta, post.observations))
    weight = (post.weights / tasks).sqrt().unsqueeze(-1)                                          # (T, N, 1)
    z = torch.cat([(weight * mean * (-log_std.detach()).exp()).reshape(-1),
                   (math.sqrt(2 / tasks) * log_std.expand(tasks, 1, -1)).reshape(-1)])
    u = torch.zeros_like(z, requires_grad=True)
    pulled = flat_grad(z, params, u, graph=True)

    def product(v: Tensor) -> Tensor:
        pushed, = torch.autograd.grad(pulled, u, v, retain_graph=True)
        return flat_grad(z, params, pushed)

    return product


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iterations: int,
                       tolerance: float = 1e-10) -> Tensor:
    """Solve product(x) = b approximately for a symmetric positive product."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr = r.clone(), r.dot(r)
    for _ in range(iterations):
        if rr <= tolerance:
            break
        q = product(p)
        step = rr / p.dot(q)
        x, r = x + step * p, r - step * q
        rr, before = r.dot(r), rr
        p = r + rr / before * p
    return x


class Trial(NamedTuple):
    """The outer surrogate loss and the mean KL of the adapted policies on the roll-outs after adaptation."""
    loss: Tensor
    kl: Tensor


def surrogate(learner: Learner, adapted: Tensors, post: Batch, old: tuple[Tensor, Tensor]) -> Trial:
    """The importance-weighted policy loss, mean over tasks, and KL(old || new)."""
    new = distribution(learner, adapted, learner.prefix(learner.theta, post.observations))
    ratio = (log_prob(*new, post.actions) - log_prob(*old, post.actions)).exp()
    mean = lambda values: (values * post.weights).sum(1).mean()
    return Trial(-mean(ratio * post.advantages), mean(gaussian_kl(*old, *new)))


def trpo_step(params: list[Tensor], gradient: Tensor, loss: float, product: Callable[[Tensor], Tensor],
              trial: Callable[[], Trial], args: argparse.Namespace) -> tuple[float, int] | None:
    """Move `params` along the natural gradient, as far as the KL allows and the loss falls.

    Returns (KL of the step, trials), or None, with `params` as they were, if no trial was accepted.
    """
    damped = lambda v: product(v) + args.damping * v
    direction = conjugate_gradient(damped, gradient, args.cg_iterations)
    direction = direction * (2 * args.max_kl / direction.dot(damped(direction))).sqrt()
    start = parameters_to_vector(params).detach()
    for k in range(args.line_search):
        vector_to_parameters(start - 0.8**k * direction, params)
        after = trial()
        if after.loss < loss and after.kl <= args.max_kl:      # false for NaN, as after a bad curvature
            return float(after.kl), k + 1
    vector_to_parameters(start, params)
    return None


def meta_step(learner: Learner, env, args: argparse.Namespace, rng: torch.Generator, where: str, run: Path) -> dict:
    """One outer update on fresh tasks; returns what log.jsonl records of it."""
    tasks, params = env.sample_tasks(args.meta_batch, rng), learner.parameters()
    start = learner.unadapted(len(tasks))
    before = collect(env, tasks, learner, start, args.rollouts, rng, where, run)
    pre = Batch.of(before, args)
    adapted = adapted_policy(learner, start, pre, args, differentiable=True)
    after = collect(env, tasks, learner, adapted, args.rollouts, rng, where, run)
    post = Batch.of(after, args)
    with torch.no_grad():
        old = distribution(learner, adapted, learner.prefix(learner.theta, post.observations))
    now = surrogate(learner, adapted, post, old)
    loss = now.loss.item()
    check_finite(loss, "meta-loss", where, run)
    gradient = flat_grad(now.loss, params, keep=False).detach()
    thin = lambda batch: batch.every(args.curvature_stride, env.horizon)

    def trial() -> Trial:
        with torch.no_grad():
            moved = adapted_policy(learner, learner.unadapted(len(tasks)), pre, args, differentiable=False)
            return surrogate(learner, moved, post, old)

    step = trpo_step(params, gradient, loss, fisher_product(learner, thin(pre), thin(post), args), trial, args)
    kl, trials = step or (0.0, args.line_search)
    std = learner.theta["log_std"].detach().exp().mean().item()
    return {"before": before.returns().mean().item(), "after": after.returns().mean().item(), "kl": kl,
            "trials": trials, "skipped": int(step is None), "std": std}


def meta_train(learner: Learner, env, args: argparse.Namespace, run: Path, checkpoint: dict | None) -> dict:
    """Train until `--iterations`, the time limit or a signal; returns the progress record."""
    rng = torch.Generator().manual_seed(args.seed)
    now = {"iteration": 0, "seconds": 0.0, "skipped": 0, "env_steps": 0, "largest_kl": 0.0, "stopped": None}
    with Training(learner, args, run, checkpoint, "iteration", now, {"rng": rng}) as training:
        while training.goes_on():
            record = meta_step(learner, env, args, rng, f"iteration {now['iteration'] + 1}", run)
            now["skipped"] += record["skipped"]
            now["largest_kl"] = max(now["largest_kl"], record["kl"])
            now["env_steps"] += 2 * args.meta_batch * args.rollouts * env.horizon
            training.advance()
            training.bar.set_postfix(before=f"{record['before']:.1f}", after=f"{record['after']:.1f}",
                                     skipped=now["skipped"])
            if training.due(args.log_every):
                append_log(run, {"iteration": now["iteration"], **record, "skipped": now["skipped"],
                                 "env_steps": now["env_steps"]})
            if training.due(args.checkpoint_every):
                training.save()
    return now


# --- evaluate --------------------------------------------------------------------------------------------------------

def evaluate(learner: Learner, env, args: argparse.Namespace, run: Path) -> tuple[Tensor, list[Rollouts]]:
    """Adapt to fresh tasks, the same for every method and seed: update k on the roll-outs of the policy after k - 1.

    Returns the tasks (T, k) and the roll-outs before the first and after each update.
    """
    rng = torch.Generator().manual_seed(EVALUATION_SEED)
    tasks = env.sample_tasks(args.test_tasks, rng)
    policy, stages = learner.unadapted(len(tasks)), []
    for update in range(args.updates + 1):
        where = f"evaluation after {update} updates"
        stages.append(collect(env, tasks, learner, policy, args.test_rollouts, rng, where, run))
        if update < args.updates:
            rate = 1.0 if update == 0 else args.later_rate
            policy = adapted_policy(learner, policy, Batch.of(stages[-1], args), args, differentiable=False, rate=rate)
    return tasks, stages


def end_points(goals: Tensor, rollouts: Rollouts) -> dict[str, float]:
    """Navigation: direction and distance of where each task's roll-outs make their last move, on average, beside the goal's.

    A policy-gradient step from roll-outs near the origin can learn the direction of the goal but hardly its distance; the
    correlation of the two radii over the tasks tells how much of the distance it learned."""
    last = rollouts.mask.sum(2).long().sub(1)[:, :, None, None].expand(-1, -1, 1, 2)
    ends = rollouts.observations.gather(2, last).squeeze(2).mean(1)                               # (T, 2)
    radius, goal_radius = ends.norm(dim=-1), goals.norm(dim=-1)
    return {"median_cosine": nn.functional.cosine_similarity(ends, goals, dim=-1).median().item(),
            "end_radius": [radius.mean().item(), radius.std().item()],
            "goal_radius": [goal_radius.mean().item(), goal_radius.std().item()],
            "radius_correlation": torch.corrcoef(torch.stack([radius, goal_radius]))[0, 1].item()}


def draw_trajectories(path: Path, goals: Tensor, stages: list[Rollouts], title: str, count: int = 4) -> None:
    """trajectories.png: the first tasks' paths, but for the last move, before (grey) and after one update (blue); a star: the goal."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, count, figsize=(3 * count, 3.3), dpi=100, squeeze=False)
    for task, axes in enumerate(panels[0][: len(goals)]):
        for stage, colour, label in ((0, "0.6", "before"), (1, "tab:blue", "after one update")):
            lengths = stages[stage].mask[task].sum(1).int().tolist()
            for k, (points, length) in enumerate(zip(stages[stage].observations[task, :5].cpu(), lengths)):
                axes.plot(*points[:length].T, color=colour, linewidth=0.9, label=label if k == 0 else None)
        axes.plot(*goals[task].cpu(), "*", color="tab:red", markersize=12, label="goal")
        axes.set(xlim=(-0.8, 0.8), ylim=(-0.8, 0.8), aspect="equal")
    panels[0][0].legend(frameon=False, fontsize=7, loc="lower left")
    figure.suptitle(title)
    figure.tight_layout()
    save_atomically(path, lambda file: figure.savefig(file, format="png"))
    plt.close(figure)


def render_film(path: Path, env: HalfCheetah, rollouts: Sequence[Tensor], label: str, every: int = 2) -> None:
    """Film roll-outs, observations (H, 20) each, side by side from their states; without a working OpenGL say so and go on."""
    import mujoco
    try:
        renderer = mujoco.Renderer(env.model, 176, 240)
    except Exception as error:                                           # each GL backend has its own exceptions
        print(f"no film: MuJoCo cannot open an OpenGL context ({type(error).__name__}: {error}); install libosmesa6 or "
              "libegl1 and set MUJOCO_GL=osmesa or egl", flush=True)
        return
    data, frames = mujoco.MjData(env.model), []
    for moment in zip(*(o[::every].double().cpu().numpy() for o in rollouts)):
        views = []
        for row in moment:
            data.qpos[:] = np.concatenate([row[TORSO_X:TORSO_X + 1], row[:8]])
            mujoco.mj_forward(env.model, data)
            renderer.update_scene(data, camera="track")
            views.append(renderer.render())
        frames.append(np.concatenate(views, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".mp4":
        import imageio
        imageio.mimwrite(path, frames, fps=round(1 / (DT * every)))
    else:
        from PIL import Image
        first, *others = (Image.fromarray(frame).quantize(64) for frame in frames)
        first.save(path, save_all=True, append_images=others, duration=int(1000 * DT * every), loop=0)
    print(f"film of {label}: {path}", flush=True)


def benchmark(args: argparse.Namespace, env, learner: Learner, repeats: int = 3) -> None:
    """Environment steps per CPU second, in turn: our roll-outs with the policy, and Gymnasium's vector environment."""
    envs, rng = args.meta_batch * args.rollouts, torch.Generator().manual_seed(args.seed)
    tasks = env.sample_tasks(args.meta_batch, rng)
    contenders = {f"ours, {args.env} with its policy": lambda: collect(
        env, tasks, learner, learner.unadapted(len(tasks)), args.rollouts, rng, "the benchmark", Path(args.out))}
    if args.env != "nav":
        contenders["gymnasium SyncVectorEnv, random actions"] = gymnasium_rollout(envs, env.horizon)
    rates = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, rollout in contenders.items():
            started = time.process_time()
            rollout()
            if repeat:                                                   # the first pass warms up
                rates[name].append(envs * env.horizon / (time.process_time() - started))
    for name, values in rates.items():
        print(f"{name}: {np.median(values):,.0f} environment steps per CPU second (median of {repeats}, "
              f"{min(values):,.0f} to {max(values):,.0f}; {envs} environments x {env.horizon} steps)", flush=True)


def gymnasium_rollout(envs: int, horizon: int) -> Callable[[], None]:
    try:
        import gymnasium
        with no_mujoco_warnings():
            theirs = gymnasium.make_vec("HalfCheetah-v5", num_envs=envs, vectorization_mode="sync")
    except ImportError as error:
        raise UsageError(f"no Gymnasium half-cheetah to compare ({error}): pip install 'gymnasium[mujoco]'") from None

    def rollout() -> None:
        theirs.reset(seed=0)
        for _ in range(horizon):
            theirs.step(theirs.action_space.sample())

    return rollout


# --- main ------------------------------------------------------------------------------------------------------------

def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    device = setup(args)
    if args.render and sys.platform == "linux" and not os.environ.get("DISPLAY"):
        os.environ.setdefault("MUJOCO_GL", "egl")            # read when mujoco is imported; its default needs a display
    try:
        backend = resolve_backend(args.kernel, device)
        env = ENVIRONMENTS[args.env](args, device)
        learner = build_learner(args, env, device)
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from None
    if args.benchmark:
        benchmark(args, env, learner)
        return
    run, checkpoint = open_run(args.out, vars(args), args.resume, may_change=EXTENSIBLE)
    print(f"{args.method} on {args.env}: {args.meta_batch} tasks x {args.rollouts} roll-outs x {env.horizon} steps, "
          f"{device} ({backend} kernel) -> {run}", flush=True)
    now = meta_train(learner, env, args, run, checkpoint)
    tasks, stages = evaluate(learner, env, args, run)
    returns = [mean_ci95(stage.returns().tolist()) for stage in stages]
    value, ci95 = returns[1]
    label = f"{args.env} {args.method}, {now['iteration']} iterations"
    plot_log(run, f"{label}: {value:.1f} after one update", "iteration", "outer iterations", "return",
             {"before the update": "before", "after one update": "after"})
    if args.env == "nav":
        draw_trajectories(run / "trajectories.png", tasks, stages, label)
    if args.render:
        before, after = (stage.observations[0, 0] for stage in stages[:2])
        render_film(Path(args.render), env, (before, after), f"task {tasks[0].tolist()}, before and after one update")
    more = {"end_points": [end_points(tasks, stage) for stage in stages]} if args.env == "nav" else {}
    write_result(run, device, {
        **more, "metric": "return after one update", "value": value, "ci95": ci95, "tasks": args.test_tasks,
        "returns": [mean for mean, _ in returns], "returns_ci95": [half for _, half in returns], "dataset": args.env,
        "config": vars(args), "seed": args.seed, "iterations": now["iteration"], "skipped": now["skipped"],
        "largest_kl": now["largest_kl"], "env_steps": now["env_steps"], "kernel": backend,
        "train_seconds": now["seconds"], "iterations_per_second": now["iteration"] / max(now["seconds"], 1e-9)})
    print(f"{label}: return after 0, 1, ... updates " + ", ".join(f"{m:.1f} ± {c:.1f}" for m, c in returns)
          + f" over {args.test_tasks} tasks; results in {run}")


if __name__ == "__main__":
    run_main(main)
