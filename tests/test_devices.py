"""Whole updates on PyTorch's meta device, which like a GPU refuses tensors of the CPU: a forgotten transfer is an error.

The networks take the layout of a GPU there, all tasks at once. Meta tensors have shapes but no numbers.
"""

import pytest
import torch

import train_celeba
import train_miniimagenet
import train_omniglot
import train_rl
from common import to_device

META = torch.device("meta")


def check(learner, *outputs):
    assert {t.device for t in (*learner.parameters(), *outputs)} == {META}
    assert all(p.grad is not None and p.grad.device == META for p in learner.parameters())


def test_the_meta_device_refuses_a_forgotten_transfer():
    with pytest.raises(RuntimeError, match="cpu"):
        torch.ones(3, device=META) + torch.ones(3)


@pytest.mark.parametrize("flags", ["", "--backbone resnet34", "--backbone wrn28-10", "--augment", "--task-chunk 2",
                                   "--batch-norm support", "--precision bf16", "--inner-steps 2 --refine", "--method maml",
                                   "--method fomaml", "--method metasgd", "--method tnet", "--method cavia",
                                   "--method pretrain --augment"])
def test_mini_imagenet(flags):
    mini = train_miniimagenet
    args = mini.parse_flags(["--image-size", "32", "--channels", "4", *flags.split()])
    learner = mini.build_learner(args, META, classes=20)
    optimiser = torch.optim.SGD(learner.parameters(), lr=0.1)
    size = mini.stored_size(args)
    images = torch.empty(20, 40, size, size, 3, dtype=torch.uint8, device=META)
    rng = torch.Generator()
    if args.method == "pretrain":
        totals = mini.pretrain_step(learner, optimiser, args, *mini.draw_images(args, images, rng))
    else:
        totals = mini.meta_step(learner, optimiser, args, mini.draw_episodes(args, images, 3, rng), None)
    check(learner, totals)
    support_x, support_y, query_x, _ = mini.sample_episodes(images, 2, args.ways, args.shots, args.queries, rng)
    logits = mini.adapt_and_predict(learner, args, mini.to_input(support_x, args), support_y,
                                    mini.to_input(query_x, args), None, train=False)
    assert logits.shape == (2, args.ways * args.queries, args.ways) and logits.device == META


@pytest.mark.parametrize("flags", ["", "--inner-steps 3", "--pixels 1000 --outer-pixels 100", "--kernel closed",
                                   "--method maml", "--method cavia", "--method cnp"])
def test_celeba(flags, monkeypatch):
    args = train_celeba.parse_flags(["--width", "64", "--meta-batch", "3", *flags.split()])
    learner = train_celeba.build_learner(args, META)
    images = torch.empty(30, 32, 32, 3, dtype=torch.uint8, device=META)
    batch = train_celeba.sample_tasks(images, args, torch.Generator())
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: torch.ones(()))    # these numbers are read
    monkeypatch.setattr(torch.Tensor, "any", lambda tensor: True)
    losses = train_celeba.meta_step(learner, torch.optim.SGD(learner.parameters(), lr=0.1), args, batch, None)
    check(learner, losses)
    given = train_celeba.sample_pixels(30, args.pixels, args.order, torch.Generator())
    assert train_celeba.complete_images(learner, args, images, given).device == META


@pytest.mark.parametrize("order", ["random", "ordered"])
def test_given_pixels_can_be_pinned(order, monkeypatch):
    """Pinning copies into memory laid out like the tensor; here that memory is ordinary."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t))
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device, non_blocking: t)
    given = train_celeba.sample_pixels(3, 4, order, torch.Generator().manual_seed(0))
    assert torch.equal(to_device(given, torch.device("cuda")), given)


@pytest.mark.parametrize("flags", ["", "--theta-update held-out --imbalanced", "--precision bf16", "--method leap",
                                   "--method reptile", "--method fomaml", "--method maml", "--protocol few-shot",
                                   "--protocol few-shot --method maml"])
def test_omniglot(flags):
    omniglot = train_omniglot
    args = omniglot.parse_flags(["--channels", "4", "--inner-steps", "3", *flags.split()])
    learner, rng = omniglot.build_learner(args, META), torch.Generator()
    split = torch.empty(40, 20, 28, 28, dtype=torch.uint8, device=META)
    if args.protocol == "multi-shot":
        split = omniglot.Alphabets(*split.expand(3, -1, -1, -1, -1).flatten(1, 2).split([600, 200], 1), ["a", "b", "c"])
    losses = omniglot.META_STEPS[args.protocol](learner, args, split, rng)
    assert {t.device for t in (losses, *learner.theta.values(), *(t.grad for t in learner.theta.values()))} == {META}


@pytest.mark.parametrize("flags", ["", "--adapt fc1.weight fc1.bias", "--method maml"])
def test_navigation(flags, monkeypatch):
    rl = train_rl
    args = rl.parse_flags(["--env", "nav", "--meta-batch", "3", "--rollouts", "2", *flags.split()])
    monkeypatch.setattr(rl.Navigation, "horizon", 6)
    env = rl.Navigation(args, META)
    learner = rl.build_learner(args, env, META)
    monkeypatch.setattr(rl, "check_rollouts", lambda *arguments: None)                     # it reads numbers
    tasks, start = env.sample_tasks(3, torch.Generator()), learner.unadapted(3)
    pre = rl.Batch.of(rl.collect(env, tasks, learner, start, 2, torch.Generator(), "", None), args)
    adapted = rl.adapted_policy(learner, start, pre, args, differentiable=True)
    post = rl.Batch.of(rl.collect(env, tasks, learner, adapted, 2, torch.Generator(), "", None), args)
    trial = rl.surrogate(learner, adapted, post, rl.distribution(learner, adapted, post.observations))
    gradient = rl.flat_grad(trial.loss, learner.parameters(), keep=False)
    product = rl.fisher_product(learner, pre.every(2, env.horizon), post.every(2, env.horizon), args)
    assert product(gradient).shape == gradient.shape and gradient.device == META
