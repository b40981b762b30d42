"""The scripts beside the ablations' results: noise in the test alone, and what M becomes."""

import json
import runpy
import sys

import pytest
import torch

import common
import runs
import train_miniimagenet as mini
from test_train_miniimagenet import TINY

sys.path.insert(0, str(runs.ROOT / "results" / "ablations"))
import context  # noqa: E402
import modulation  # noqa: E402
import noise  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return runs.complete("train_miniimagenet.py", *TINY, "--threads", "1", home=tmp_path_factory.mktemp("home"))[0]


@pytest.fixture(autouse=True)
def synthetic(monkeypatch):
    """In place of the real images; torch's threads as they were."""
    monkeypatch.setattr(mini, "load_split", lambda root, split, size, nearest: mini.synthetic_split(split, image_size=size))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def call(monkeypatch, script, *arguments):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)           # what is compared with is on the CPU
    script.main()


def test_noise_is_measured_once_and_kept(run, tmp_path, monkeypatch):
    path = tmp_path / "noise.json"
    call(monkeypatch, noise, run, "--levels", 0, 1000, "--tasks", 6, "--json", path)
    figures = json.loads(path.read_text())["runs"][run.name]
    assert figures["method"] == "modgrad" and set(figures["accuracy"]) == {"0", "1000"}
    assert figures["accuracy"]["0"]["value"] == pytest.approx(runs.result(run)["value"])        # the run's own six test tasks
    assert figures["accuracy"]["1000"]["value"] != figures["accuracy"]["0"]["value"]
    path.with_suffix(".png").unlink()
    monkeypatch.setattr(mini, "evaluate", lambda *arguments: pytest.fail("measured again"))
    call(monkeypatch, noise, run, "--levels", 0, 1000, "--tasks", 6, "--json", path)
    assert path.with_suffix(".png").exists()
    monkeypatch.setattr(mini, "evaluate", lambda *arguments: [0.25, 0.25])
    call(monkeypatch, noise, run, "--levels", 0, "--tasks", 6, "--json", path, "--data", tmp_path)
    again = json.loads(path.read_text())["runs"][run.name]["accuracy"]
    assert again["0"] == {"value": 0.25, "ci95": 0, "tasks": 6, "data": str(tmp_path), "precision": "fp32"}
    assert again["1000"] == figures["accuracy"]["1000"]


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_a_run_of_a_gpu_is_measured_in_its_precision_and_here_too(run, tmp_path, precision):
    recorded = json.loads((run / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(recorded | {"kernel": "triton", "precision": precision}))
    (tmp_path / "checkpoint.pt").write_bytes((run / "checkpoint.pt").read_bytes())
    try:
        args, learner = noise.load_run(tmp_path, torch.device("cpu"))
        assert torch.backends.cudnn.allow_tf32 == (precision == "tf32")
        images = mini.to_tensor(mini.synthetic_split("test", image_size=args.image_size))
        assert len(mini.evaluate(learner, args, images, 2, "here")) == 2
    finally:
        common.allow_tf32(False)


def test_the_mask_is_that_of_the_last_step(run, tmp_path, monkeypatch):
    path = tmp_path / "modulation.json"
    call(monkeypatch, modulation, run, "--tasks", 7, "--json", path)
    figures = json.loads(path.read_text())["runs"][run.name]
    tensors = figures["tensors"]
    assert figures["own_less_other"]["value"] == pytest.approx(figures["own"]["value"] - figures["of_another_task"]["value"])
    assert set(tensors) == {f"conv{k}.{kind}" for k in (3, 4) for kind in ("weight", "bias")}
    args, learner = noise.load_run(run, torch.device("cpu"))
    images = mini.to_tensor(mini.synthetic_split("test", image_size=args.image_size))
    with torch.no_grad():      # nu = 0 gives one M for all tasks, each its own nu another
        at_zero = learner.generator(torch.zeros(1, args.context_dim))["conv4.weight"]
    found, nu, accuracies = modulation.masks(learner, args, images, 7, "masks")
    found = found["conv4.weight"]
    with torch.no_grad():
        row, col = learner.generator(nu)["conv4.weight"]
    torch.testing.assert_close(found, (row.unsqueeze(2) * col.unsqueeze(1)).relu())
    assert figures["context"] == pytest.approx(modulation.describe_context(nu))
    untrained = modulation.with_untrained_psi(learner, args)
    assert untrained.theta is learner.theta
    assert figures["context_of_untrained_psi"] == pytest.approx(
        modulation.describe_context(modulation.masks(untrained, args, images, 7, "untrained")[1]))
    with torch.no_grad():                                                                       # M = 1 before training
        torch.testing.assert_close(untrained.generator(torch.zeros_like(nu))["conv4.weight"][0], torch.ones(7, 24))
    assert figures["own"]["value"] == pytest.approx(sum(accuracies) / 7)
    assert found.shape == (7, 24, 24) and (found - (at_zero[0].unsqueeze(2) * at_zero[1].unsqueeze(1)).relu()).abs().max() > 0
    assert tensors["conv4.weight"]["rms"] == pytest.approx(found.square().mean().sqrt().item())
    assert 0 < tensors["conv4.weight"]["spread"]


def test_a_task_gets_the_mask_of_the_one_before_it(run, monkeypatch):
    args, learner = noise.load_run(run, torch.device("cpu"))
    images = mini.to_tensor(mini.synthetic_split("test", image_size=args.image_size))
    own = modulation.masks(learner, args, images, args.eval_batch, "own")[0]["conv4.weight"]
    taken, plain = [], sys.modules["modgrad"].modulated_step
    monkeypatch.setattr(sys.modules["modgrad"], "modulated_step", lambda theta, grad, row, col, kernel: (
        taken.append((row, col)), plain(theta, grad, row, col, kernel=kernel))[1])
    modulation.with_masks_of_others(learner, args, images, args.eval_batch, "others")
    row, col = (part[list(learner.adapted).index("conv4.weight")] for part in taken[-1])
    torch.testing.assert_close((row.unsqueeze(2) * col.unsqueeze(1)).relu(), args.inner_lr * own.roll(1, 0))
    with pytest.raises(noise.UsageError, match="one task alone"):
        modulation.with_masks_of_others(learner, args, images, args.eval_batch + 1, "others")


def test_numbers_of_a_mask():
    described = modulation.describe(torch.tensor([[[0.0, 3.0]], [[0.0, 5.0]]]))
    assert described == pytest.approx({"mean": 2.0, "rms": 8.5 ** 0.5, "zeros": 0.5, "spread": (1 / 8.5) ** 0.5})


def test_numbers_of_a_context():
    nu = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
    cosine = torch.nn.functional.cosine_similarity
    pairs = [cosine(nu[i], nu[j], dim=0).item() for i, j in ((0, 1), (0, 2), (1, 2))]
    length = nu.norm(dim=1)
    described = modulation.describe_context(nu)
    assert described == pytest.approx({"cosine": sum(pairs) / 3, "length": length.mean().item(),
                                       "spread": (length.std() / length.mean()).item()})


def test_what_is_no_run_or_has_no_mask_is_refused(run, tmp_path, monkeypatch):
    with pytest.raises(noise.UsageError, match="holds no run"):
        call(monkeypatch, noise, tmp_path, "--json", tmp_path / "noise.json")
    monkeypatch.setattr(noise, "load_run", lambda path, device: (mini.parse_flags(["--method", "maml"]), None))
    with pytest.raises(noise.UsageError, match="run of maml, which has no M"):
        call(monkeypatch, modulation, run, "--json", tmp_path / "modulation.json")


def test_the_figure_of_full_size_shows_what_the_results_say():
    folder = runs.ROOT / "results" / "miniimagenet"
    figure = runpy.run_path(str(folder / "figure.py"))
    for name in figure["RUNS"]:
        result = json.loads((folder / name / "result.json").read_text())
        episodes, accuracy, _ = max(figure["validations"](folder / name), key=lambda row: row[1])
        assert (episodes, accuracy) == (result["best_episode"], pytest.approx(100 * result["best_val_accuracy"]))


def check_nu(learner, args, images):
    """float32: two ways to sum, g' from two forms of the step, agree to 1e-3 of the largest."""
    nu = torch.zeros(7, args.context_dim, requires_grad=True)
    factors, found = learner.generator(nu), context.signals(learner, args, images, 7)
    reached = sum((factors[name][0] * by_row + factors[name][1] * by_col).sum() for name, (*_, by_row, by_col) in found.items())
    seen = modulation.masks(learner, args, images, 7, "masks")[1]
    torch.testing.assert_close(-torch.autograd.grad(reached, nu)[0], seen, rtol=1e-3, atol=1e-3 * seen.abs().max().item())


def test_what_reaches_the_context_is_nu(run, tmp_path, monkeypatch):
    """nu is minus what Psi's derivative at nu = 0 makes of dL/drow and dL/dcol; biases behind batch norm add nothing."""
    args, learner = noise.load_run(run, torch.device("cpu"))
    images = mini.to_tensor(mini.synthetic_split("test", image_size=args.image_size))
    sister = learner.generator.cols["conv4/weight"]
    for closed in (True, False):                        # where every second entry of M is 0, and as the run left it
        shift = -3 if closed else 3
        with torch.no_grad():
            sister.outer.bias[sister.columns::2] += shift
        check_nu(learner, args, images)
    found = context.signals(learner, args, images, 7)
    assert set(found) == {"conv3.weight", "conv4.weight"} and all(len(t) == 7 for parts in found.values() for t in parts)
    path = tmp_path / "context.json"
    call(monkeypatch, context, run, "--tasks", 7, "--json", path)
    kept = json.loads(path.read_text())["runs"][run.name]["tensors"]["conv4.weight"]
    assert kept == pytest.approx(context.describe(*found["conv4.weight"]), rel=1e-4, abs=1e-6)      # float32, sums on other threads


def test_numbers_of_what_reaches_the_context():
    g, after = torch.tensor([[[3.0, 4.0]], [[-4.0, 3.0]]]), torch.tensor([[[3.0, 4.0]], [[4.0, 3.0]]])
    by_m = -g * after                                                      # -9, -16 and 16, -9
    described = context.describe(g, after, by_m, by_m.sum(2), by_m.flatten(1))
    assert described == pytest.approx({"alike": (1 - 7 / 25) / 2, "positive": 34 / 50, "cosine_of_g": 0, "cosine_of_dM": 0,
                                       "cosine_of_drow": -1, "cosine_of_dcol": 0}, abs=1e-6)
