"""What only a GPU can show: whole meta-steps there against the CPU's and against each other. Skipped without one."""

import signal
from types import SimpleNamespace

import pytest
import torch

import common
import train_celeba as celeba
import train_miniimagenet as mini
import train_omniglot as omniglot

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CUDA = torch.device("cuda")
TINY = ["--image-size", "32", "--channels", "16", "--context-dim", "16", "--queries", "5"]


@pytest.fixture(scope="module")
def images():
    return mini.synthetic_split("val", image_size=32)


def trajectory(images, device, steps, *flags, dtype=torch.float32):
    """(loss, accuracy) of each step, (steps, 2), and the learner."""
    args = mini.parse_flags([*TINY, "--device", str(device), *flags])
    mini.setup(args)
    learner = mini.build_learner(args, device)
    learner = learner._replace(theta={name: torch.nn.Parameter(t.detach().to(dtype)) for name, t in learner.theta.items()},
                               generator=learner.generator and learner.generator.to(dtype))
    gradient = mini.make_gradient(learner, args, device)
    optimiser, rng, data = torch.optim.Adam(learner.parameters(), 1e-3), torch.Generator().manual_seed(0), mini.to_tensor(images, device)
    totals = [mini.meta_step(learner, optimiser, args, mini.draw_episodes(args, data, 2, rng), None, gradient=gradient)
              for _ in range(steps)]
    return torch.stack(totals).cpu(), learner


@pytest.mark.parametrize("method", ["modgrad", "maml", "metasgd", "tnet", "cavia"])
@pytest.mark.parametrize("graph", ["--cuda-graph", "--no-cuda-graph"])
def test_the_first_gradient_is_the_cpus_in_float64(graph, method, images, monkeypatch):
    monkeypatch.setattr(mini, "normalise", lambda x, dtype=None, own=mini.normalise: own(x, torch.float64))
    here, there = (trajectory(images, device, 1, "--method", method, "--inner-steps", "2", *flags, dtype=torch.float64)
                   for device, flags in ((torch.device("cpu"), []), (CUDA, [graph])))
    torch.testing.assert_close(there[0], here[0].to(there[0].dtype), rtol=1e-5, atol=0)         # kept in float32
    for name, p in here[1].theta.items():
        assert ((there[1].theta[name].grad.cpu() - p.grad).norm() <= 1e-9 * p.grad.norm().clamp_min(1e-9)), name


@pytest.mark.parametrize("method", ["modgrad", "maml"])
def test_a_replayed_trajectory_of_thirty_steps_is_the_launched_one(method, images):
    """Every loss. cuDNN may add in another order from call to call, and Adam lets that grow: to 1.4 % in 30 steps, as seen."""
    flags = ["--method", method, "--inner-steps", "1"]
    launched, replayed = (trajectory(images, CUDA, 30, *flags, graph)[0] for graph in ("--no-cuda-graph", "--cuda-graph"))
    torch.testing.assert_close(replayed[:10, 0], launched[:10, 0], rtol=2e-3, atol=0)
    torch.testing.assert_close(replayed[:, 0], launched[:, 0], rtol=0.05, atol=0)


def test_a_recorded_gradient_follows_weights_and_batches(images):
    """A replay reads the present weights and batch, not those of the recording; a smaller last batch is recorded for itself."""
    args = mini.parse_flags([*TINY, "--device", "cuda"])
    mini.setup(args)
    learner, data, rng = mini.build_learner(args, CUDA), mini.to_tensor(images, CUDA), torch.Generator().manual_seed(1)
    recorded = mini.make_gradient(learner, args, CUDA)
    for tasks in (3, 3, 2, 3):
        batch = mini.draw_episodes(args, data, tasks, rng)
        totals = recorded(batch, None, tasks)
        gradients = [p.grad.clone() for p in learner.parameters()]
        expected = mini.meta_gradient(learner, args, batch, None, tasks)
        torch.testing.assert_close(totals, expected, rtol=1e-4, atol=1e-5)
        for p, g in zip(learner.parameters(), gradients):
            assert (p.grad - g).norm() <= 0.02 * p.grad.norm().clamp_min(1e-4)
        with torch.no_grad():
            for p in learner.parameters():
                p.mul_(0.98)


@pytest.mark.parametrize("precision, allowed", [("tf32", 0.1), ("bf16", 0.4)])
def test_lower_precision_is_near(precision, allowed, images):
    """Ten losses that start near ln 5 = 1.6; rounding of 5e-4 and 4e-3 a number, which Adam lets grow."""
    losses = [trajectory(images, CUDA, 10, "--precision", p)[0][:, 0] for p in ("fp32", precision)]
    assert (losses[1] - losses[0]).abs().max() <= allowed and not torch.equal(*losses)


def test_what_goes_aside_gives_the_same_gradient(images, monkeypatch):
    """With the queries' prefix on a stream of its own and without, launched and recorded."""
    def gradient(graph):
        (totals, learner) = trajectory(images, CUDA, 1, graph)
        return torch.cat([totals[0], *(p.grad.flatten().cpu() for p in learner.parameters())])

    aside = [gradient(graph) for graph in ("--cuda-graph", "--no-cuda-graph")]
    monkeypatch.setattr(mini, "Aside", lambda function, x: SimpleNamespace(result=lambda: function(x)))
    expected = gradient("--no-cuda-graph")
    assert all((found - expected).norm() <= 1e-3 * expected.norm() for found in aside)


SHORT = ["--image-size", "32", "--episodes", "12", "--val-every", "6", "--val-episodes", "4", "--test-episodes", "4",
         "--checkpoint-every", "3", "--log-every", "3", "--queries", "5", *TINY[2:4]]


@pytest.mark.parametrize("flags", ["", "--batch-norm support", "--method maml --inner-steps 2", "--method metasgd",
                                   "--method tnet", "--method cavia", "--method fomaml", "--inner-steps 2 --refine", "--task-chunk 1",
                                   "--backbone wrn28-10 --channels 4 --augment", "--backbone resnet34 --channels 4"])
def test_a_run_resumes_on_the_other_device(flags, tmp_path, monkeypatch):
    """Half a run here, half on the CPU: what is saved on one device is read on the other."""
    given = [*SHORT, "--out", str(tmp_path / "run"), *flags.split()]
    save, saved = common.save_checkpoint, []

    def stop_after_the_first(run, state):
        save(run, state)
        if not saved:
            signal.raise_signal(signal.SIGTERM)
        saved.append(state["now"]["episode"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common, "save_checkpoint", stop_after_the_first)
        mini.main([*given, "--device", "cuda"])
    assert 0 < saved[-1] < 12
    mini.main([*given, "--device", "cpu", "--resume"])
    logged = [line["episode"] for line in common.read_log(tmp_path / "run") if "loss" in line]
    assert logged == sorted(set(logged)) and logged[-1] == 12


def test_a_run_with_noise_in_the_gradient(tmp_path):
    mini.main([*SHORT, "--out", str(tmp_path / "run"), "--gradient-noise", "0.1", "--device", "cuda"])


@pytest.mark.parametrize("method", ["modgrad", "maml"])
def test_the_kernels_gradient_is_the_cpus(method, images, monkeypatch):
    """In float32, with the Triton blocks of 16 and more channels; a ReLU that rounding flips moves a gradient by a few percent."""
    (here, cpu), (there, gpu) = (trajectory(images, device, 1, "--method", method, "--inner-steps", "2")
                                 for device in (torch.device("cpu"), CUDA))
    torch.testing.assert_close(there[:, 0], here[:, 0], rtol=1e-4, atol=0)
    both = [torch.cat([p.grad.flatten().cpu() for p in learner.parameters()]) for learner in (cpu, gpu)]
    assert (both[0] - both[1]).norm() <= 0.05 * both[0].norm()


@pytest.mark.parametrize("flags", ["", "--inner-steps 3", "--pixels 100", "--pixels 100 --outer-pixels 50", "--order ordered",
                                   "--method maml",
                                   "--method cavia", "--method cnp"])
def test_image_completion_replayed_is_that_of_the_cpu(flags):
    """Ten updates; float32 sums in another order leave 1e-6 of a loss, which the updates let grow."""
    images, trained = torch.from_numpy(celeba.synthetic_split("val")), []
    for device, graph in ((torch.device("cpu"), "--no-cuda-graph"), (CUDA, "--no-cuda-graph"), (CUDA, "--cuda-graph")):
        args, rng = celeba.parse_flags(["--device", str(device), graph, *flags.split()]), torch.Generator().manual_seed(0)
        celeba.setup(args)
        learner, here = celeba.build_learner(args, device), images.to(device)
        optimiser, gradient = torch.optim.Adam(learner.parameters(), 1e-4), celeba.make_gradient(learner, args, device)
        trained.append(torch.stack([celeba.meta_step(learner, optimiser, args, celeba.sample_tasks(here, args, rng), None, gradient)
                                    for _ in range(10)]).cpu())
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("flags", ["", "--method leap", "--method reptile", "--method maml --inner-steps 3",
                                   "--protocol few-shot", "--protocol few-shot --method maml --inner-steps 2"])
def test_omniglot_replayed_is_that_of_the_cpu(flags, monkeypatch):
    """A meta-step and its direction in float64. In float32 roundings alone move those of the multi-shot network by up to 0.6 and
    130 % on these images: batch norm divides by standard deviations that are nearly zero, step after step."""
    wide, fresh = torch.float64, omniglot.fresh_statistics
    monkeypatch.setattr(omniglot, "activation_type", lambda args: wide)
    monkeypatch.setattr(omniglot, "fresh_statistics", lambda *args: {k: tuple(t.to(wide) for t in pair) for k, pair in fresh(*args).items()})
    drawings, found = omniglot.synthetic_drawings(), []
    for device, graph in ((torch.device("cpu"), "--no-cuda-graph"), (CUDA, "--no-cuda-graph"), (CUDA, "--cuda-graph")):
        args = omniglot.parse_flags(["--channels", "8", "--inner-steps", "3", "--meta-batch", "2", "--device", str(device), graph,
                                     *flags.split()])
        omniglot.setup(args)
        few_shot, rng = args.protocol == "few-shot", torch.Generator().manual_seed(0)
        splits = omniglot.split_characters(drawings, device) if few_shot else omniglot.split_alphabets(drawings, 25, 1, device)
        learner = omniglot.build_learner(args, device)
        learner = learner._replace(theta={name: torch.nn.Parameter(t.detach().to(wide)) for name, t in learner.theta.items()},
                                   generator=learner.generator and learner.generator.to(wide))
        part = omniglot.PARTS[args.protocol](learner, args, device)
        losses = omniglot.META_STEPS[args.protocol](learner, args, splits["train"], rng, part)
        found.append((losses.cpu(), torch.cat([t.grad.flatten().cpu() for t in learner.theta.values()])))
    for losses, direction in found[1:]:
        torch.testing.assert_close(losses, found[0][0], rtol=1e-6, atol=0)
        assert (direction - found[0][1]).norm() <= 1e-6 * found[0][1].norm()
