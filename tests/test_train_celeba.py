"""Image completion: pixels, every method against a loop over tasks, the data, complete runs, bad input."""

import functools
import hashlib
import importlib.util
import json
import math
import os
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import naive
import runs
import train_celeba as celeba
from common import DataError, UsageError, read_log

torch.set_num_threads(1)                 # the networks are tiny, and other work may share the machine
TINY = ["--width", "16", "--context-dim", "8", "--iterations", "12", "--val-every", "6", "--val-images", "6",
        "--test-images", "6", "--log-every", "3", "--checkpoint-every", "3", "--meta-batch", "4", "--device", "cpu",
        "--threads", "1"]


script = functools.partial(runs.script, "train_celeba.py")


def here(*flags):
    """A complete run in this process: its result."""
    celeba.main([*map(str, flags)])
    return runs.result(flags[flags.index("--out") + 1])


# --- completions by the training images' statistics (results/celeba/linear.py) ---

@pytest.fixture(scope="module")
def linear():
    path = Path(celeba.__file__).parent / "results/celeba/linear.py"
    spec = importlib.util.spec_from_file_location("linear", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_linear_completion_is_exact_on_a_subspace_and_least_squares_elsewhere(linear):
    rng = torch.Generator().manual_seed(0)
    errors = lambda train, test, given, ridge: linear.completion_errors(
        linear.one_gaussian(train.flatten(1)), test, given, ridge, "test")
    given = torch.tensor([[3, 700]])
    flat = (torch.randn(50, 4, generator=rng) @ torch.randn(4, 3072, generator=rng)).view(50, 1024, 3)
    assert errors(flat, flat[:1], given, 1e-6)[0] < 1e-6             # four degrees of freedom, six numbers given
    noisy = torch.randn(50, 1024, 3, generator=rng)
    known = torch.cat([noisy[:, given[0]].flatten(1), torch.ones(50, 1)], 1)
    fit = known @ torch.linalg.lstsq(known, noisy.flatten(1)).solution
    found = errors(noisy, noisy[:5], given.expand(5, -1), 0.0)
    assert np.allclose(found, (fit[:5] - noisy[:5].flatten(1)).square().mean(1), rtol=1e-3)


def test_the_additive_rule_is_the_best_of_its_kind(linear):
    """One given pixel has no other: it is the linear rule. With two, no change of K does better on the images it is of."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(300, 6, generator=rng) @ torch.randn(6, 3 * 16, generator=rng)
    images = (images + 0.1 * torch.randn(300, 48, generator=rng)).view(300, 16, 3)
    model = linear.one_gaussian(images.flatten(1))
    given = torch.rand(300, 16, generator=rng).topk(1).indices
    alone = linear.additive_errors(model, images, given, 1e-4)
    assert np.allclose(alone, linear.completion_errors(model, images, given, 1e-4, "test"), rtol=1e-3)
    pairs = torch.combinations(torch.arange(16))
    every = lambda: np.mean([np.mean(linear.additive_errors(model, images, pair.expand(300, -1), 1e-9)) for pair in pairs])
    rule, least = linear.additive_rule(model, 2, 1e-9), every()
    for change in 0.01 * torch.randn(3, 48, 48, generator=rng).double():
        linear.additive_rule, kept = lambda *_: rule + change, linear.additive_rule
        assert every() > least
        linear.additive_rule = kept
    assert np.mean(linear.completion_errors(model, images, pairs[7].expand(300, -1), 1e-4, "test")) < least


def test_a_mixture_completes_what_no_linear_rule_can(linear):
    """Two kinds of images around opposite means, with five patterns of their own each: nine numbers are given, which tell
    the kind and then its five sizes, but not eleven sizes at once."""
    rng = torch.Generator().manual_seed(0)
    centre, patterns = 0.3 * torch.randn(3072, generator=rng), 0.1 * torch.randn(2, 5, 3072, generator=rng)
    kind, size = torch.arange(600) % 2, torch.randn(600, 1, 5, generator=rng)
    images = (2 * kind - 1)[:, None] * centre + (size @ patterns[kind])[:, 0]
    images += 0.01 * torch.randn(600, 3072, generator=rng)
    test, given = images[:20].view(20, 1024, 3), torch.tensor([[5, 90, 333]]).expand(20, -1)
    mixture = linear.fit_mixture(images, 2, 20, 10, prior=1.0)
    assert torch.allclose(mixture.shares, torch.full((2,), 0.5).double(), atol=0.01)
    means = mixture.means[(mixture.means.float() @ centre).argsort()]
    assert (means - torch.stack([-centre, centre])).abs().max() < 0.1
    one, two = (np.mean(linear.completion_errors(model, test, given, 1e-4, "test"))
                for model in (linear.one_gaussian(images), mixture))
    assert two < 0.5 * one


# --- pixels ---

def test_random_pixels_are_distinct_and_uniform():
    given = celeba.sample_pixels(4000, 10, "random", torch.Generator().manual_seed(0))
    assert given.shape == (4000, 10) and all(len(set(row)) == 10 for row in given.tolist())
    counts = given.flatten().bincount(minlength=1024).float()        # 39.1 expected per pixel, standard deviation 6.2
    assert len(counts) == 1024 and abs(counts.std() - 6.2) < 0.6     # 4 standard errors, 6.2 / sqrt(2048) each


def test_ordered_pixels_are_the_first_in_row_major_order():
    image = np.zeros((1, 32, 32, 3), np.uint8)
    image[0, 0], image[0, 1, :8] = 1, 1                              # 40 pixels: the top row and eight of the second
    given = celeba.sample_pixels(1, 40, "ordered", torch.Generator())
    assert (celeba.masked(image, given) == 1).sum() == 40 * 3


def test_coordinates_are_row_and_column_over_32_in_the_order_of_the_colours():
    x = celeba.coordinates(torch.device("cpu"))
    image = torch.arange(32 * 32 * 3).remainder(251).to(torch.uint8).reshape(1, 32, 32, 3)
    y = celeba.colours(image)[0]
    for row, column in ((0, 0), (0, 31), (3, 7), (31, 0)):
        number = 32 * row + column
        assert x[number].tolist() == [row / 32, column / 32]
        assert torch.equal(y[number], image[0, row, column] / 255)


def test_every_method_sees_the_same_evaluation_pixels_whatever_its_seed_and_batch(monkeypatch):
    seen = []
    monkeypatch.setattr(celeba, "complete_images", lambda learner, args, images, given, rng: seen.append(given) or
                        celeba.colours(images))
    images = torch.from_numpy(celeba.synthetic_split("val"))[:7]
    for seed, batch in (("1", "7"), ("2", "3")):
        celeba.evaluate(None, celeba.parse_flags(["--seed", seed, "--eval-batch", batch]), images, "test")
    assert torch.equal(seen[0], torch.cat(seen[1:]))


# --- the methods against a loop over tasks ---

@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def naive_output(theta, x):
    """The network on one task; a context, where there is one, is appended to every pixel's coordinates."""
    layers = {name: t for name, t in theta.items() if name != "context"}
    if "context" in theta:
        x = torch.cat([x, theta["context"].expand(len(x), -1)], 1)
    return naive.mlp_output(layers, x)


@pytest.mark.parametrize("flags", [
    ["--method", "modgrad"],
    ["--method", "modgrad", "--inner-steps", "2"],
    ["--method", "modgrad", "--inner-steps", "2", "--kernel", "closed"],
    ["--method", "modgrad", "--adapt", "context", "fc1.weight", "fc4.bias", "fc6.weight", "--inner-steps", "2"],
    ["--method", "maml", "--inner-steps", "3"],
    ["--method", "maml", "--inner-steps", "2", "--first-order"],
    ["--method", "cavia", "--inner-steps", "3"],
], ids=["modgrad", "modgrad-2-steps", "modgrad-2-steps-dense", "modgrad-context-2-steps", "maml", "maml-first-order",
        "cavia"])
def test_the_batch_equals_a_loop_over_tasks(flags, double):
    """Loss and meta-gradients of one outer update; float64 sums in another order leave about 1e-14 of the largest."""
    torch.manual_seed(0)
    large = ["--inner-lr", "2.0", "--clip-norm", "1e9"]              # a large step, so that adaptation matters
    args = celeba.parse_flags([*TINY, "--pixels", "4", *flags, *large])
    learner, x = celeba.build_learner(args, torch.device("cpu")), celeba.coordinates(torch.device("cpu"))
    target, given, query = torch.rand(3, 1024, 3), torch.randint(1024, (3, 5)), torch.randperm(1024)[:30]
    optimiser = torch.optim.SGD(learner.parameters(), lr=0.0)
    loss = celeba.meta_step(learner, optimiser, args, (target, given, query), None)[0]
    ours = [p.grad for p in learner.parameters()]

    psi = dict(learner.generator.named_parameters()) if learner.generator else None
    theta = {**learner.theta, **({"context": torch.zeros(8, requires_grad=True)} if "context" in learner.theta else {})}
    losses = []
    for task in range(3):
        support = lambda theta: F.mse_loss(naive_output(theta, x[given[task]]), target[task, given[task]])
        adapted = naive.adapt_one(support, theta, learner.adapted, psi, 2.0, 8, 5, args.inner_steps, args.first_order)
        losses.append(F.mse_loss(naive_output(adapted, x[query]), target[task, query]))
    expected = torch.autograd.grad(sum(losses) / 3, learner.parameters())
    assert abs(loss - sum(losses) / 3) < 1e-12
    largest = max(g.abs().max() for g in expected)
    assert all((a - b).abs().max() < 1e-11 * largest for a, b in zip(ours, expected))


@pytest.mark.parametrize("flags", [[], ["--pixels", "100", "--outer-pixels", "30"], ["--method", "cnp"], ["--method", "cavia"]])
def test_recorded_gradients_train_as_launched_ones_do(flags, monkeypatch):
    """With a recording imitated on the CPU: another batch, weights and shortened gradients in each step. On a GPU: test_cuda.py."""
    made, trained = runs.imitate_cuda_graphs(monkeypatch), []
    images = torch.from_numpy(celeba.synthetic_split("val"))
    for device in (torch.device("cuda"), torch.device("cpu")):
        args, rng = celeba.parse_flags([*TINY, "--clip-norm", "1e-2", *flags]), torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        learner = celeba.build_learner(args, torch.device("cpu"))
        optimiser, gradient = torch.optim.Adam(learner.parameters()), celeba.make_gradient(learner, args, device)
        losses = [celeba.meta_step(learner, optimiser, args, celeba.sample_tasks(images, args, rng), None, gradient)
                  for _ in range(3)]
        trained.append([*losses, *(p.detach() for p in learner.parameters())])
    assert made == [4] and all(torch.equal(*pair) for pair in zip(*trained))


@pytest.mark.parametrize("flags, said", [(["--cuda-graph"], "needs a CUDA device"),
                                         (["--cuda-graph", "--gradient-noise", "0.1"], "cannot record --gradient-noise")])
def test_a_recording_that_cannot_be_is_refused(flags, said, tmp_path):
    assert said in runs.refusal(celeba.main, *TINY, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_a_long_outer_gradient_is_shortened():
    args = celeba.parse_flags([*TINY, "--clip-norm", "1e-3"])
    learner, images = celeba.build_learner(args, torch.device("cpu")), torch.from_numpy(celeba.synthetic_split("val"))
    optimiser = torch.optim.SGD(learner.parameters(), lr=0.0)
    batch = celeba.sample_tasks(images, args, torch.Generator().manual_seed(0))
    celeba.meta_step(learner, optimiser, args, batch, None)
    norm = lambda: torch.cat([p.grad.flatten() for p in learner.parameters()]).norm()
    assert abs(norm() - 1e-3) < 1e-5
    args.clip_norm = None
    celeba.meta_step(learner, optimiser, args, batch, None)
    assert norm() > 2e-3


@pytest.mark.parametrize("kernel", ["auto", "closed"])
def test_an_update_with_a_diverged_inner_loop_is_left_out(kernel, tmp_path):
    args = celeba.parse_flags([*TINY, "--pixels", "4", "--kernel", kernel, "--inner-lr", "1e30"])
    torch.manual_seed(0)
    learner, images = celeba.build_learner(args, torch.device("cpu")), torch.from_numpy(celeba.synthetic_split("val"))
    optimiser, before = torch.optim.SGD(learner.parameters(), lr=1.0), learner.state()
    batch = celeba.sample_tasks(images, args, torch.Generator().manual_seed(0))
    assert celeba.meta_step(learner, optimiser, args, batch, None) is None
    assert all(torch.equal(t, learner.theta[name]) for name, t in before["theta"].items())
    args.iterations, args.val_every = 50, 50
    (tmp_path / "log.jsonl").touch()
    with pytest.raises(UsageError, match="not finite in 11 of 11 iterations"):
        celeba.meta_train(learner, args, tmp_path, None, {"train": images, "val": images}, torch.device("cpu"))


def test_weights_that_diverge_on_a_validation_image_are_passed_over(tmp_path, monkeypatch, capsys):
    args, images = celeba.parse_flags([*TINY, "--val-images", "3"]), torch.from_numpy(celeba.synthetic_split("val"))
    learner = celeba.build_learner(args, torch.device("cpu"))
    now = {"iteration": 0, "best_mse": None, "best_iteration": None, "best": None, "diverged": 0}
    (tmp_path / "log.jsonl").touch()
    for k, errors in enumerate(([.3, .2, .1], [.1, math.inf, .1], [math.nan, .1, .1], [.1, .1, .1], [.4, .4, .4]), start=1):
        now["iteration"] = k
        monkeypatch.setattr(celeba, "evaluate", lambda *_: errors)
        celeba.validate(learner, args, tmp_path, images, now)
    assert (now["best_iteration"], now["diverged"]) == (4, 0) and now["best_mse"] == pytest.approx(0.1)
    assert [sorted(line)[1] for line in read_log(tmp_path)] == [
        "val_ci95", "val_diverged", "val_diverged", "val_ci95", "val_ci95"]
    assert "diverged on 1 of 3 validation images; the best weights remain those of iteration 1" in capsys.readouterr().err
    monkeypatch.setattr(celeba, "evaluate", lambda *_: [math.inf])
    with pytest.raises(UsageError, match="non-finite validation error"):
        for _ in range(3):
            celeba.validate(learner, args, tmp_path, images, now)


def test_thin_factors_complete_images_as_whole_matrices_do(double):
    args = celeba.parse_flags([*TINY, "--pixels", "4", "--inner-steps", "2", "--inner-lr", "2.0"])
    assert celeba.few_pixels(args)
    learner, images = celeba.build_learner(args, torch.device("cpu")), torch.from_numpy(celeba.synthetic_split("val")[:3])
    given = celeba.sample_pixels(3, 4, "random", torch.Generator().manual_seed(0))
    thin = celeba.complete_images(learner, args, images, given)
    args.kernel = "closed"
    assert not celeba.few_pixels(args)
    assert (thin - celeba.complete_images(learner, args, images, given)).abs().max() < 1e-12
    for flags in ([], ["--pixels", "4", "--gradient-noise", "1"], ["--pixels", "4", "--adapt", "fc4.weight", "fc4.bias"],
                  ["--pixels", "4", "--refine"], ["--pixels", "4", "--method", "maml"]):
        assert not celeba.few_pixels(celeba.parse_flags([*TINY, *flags]))


def test_cnp_equals_its_equations_task_by_task(double):
    """Encoder, mean over the given pixels, decoder, Gaussian likelihood with std 0.1 + 0.9 softplus; float64."""
    args = celeba.parse_flags([*TINY, "--method", "cnp"])
    learner, x = celeba.build_learner(args, torch.device("cpu")), celeba.coordinates(torch.device("cpu"))
    target, given = torch.rand(3, 1024, 3), torch.randint(1024, (3, 5))
    given_colours = torch.stack([y[pixels] for y, pixels in zip(target, given)])
    output = celeba.adapt_and_predict(learner, args, given, given_colours, None, None, train=False)
    part = lambda name: {n.removeprefix(name): t for n, t in learner.theta.items() if n.startswith(name)}
    for task in range(3):
        samples = torch.cat([x[given[task]], given_colours[task]], 1)
        code = naive.mlp_output(part("encoder."), samples).mean(0)
        decoded = naive.mlp_output(part("decoder."), torch.cat([x, code.expand(1024, -1)], 1))
        normal = torch.distributions.Normal(decoded[:, :3], 0.1 + 0.9 * F.softplus(decoded[:, 3:]))
        likelihood = -normal.log_prob(target[task]).mean() - 0.5 * np.log(2 * np.pi)
        assert abs(celeba.outer_loss(output, target)[task] - likelihood) < 1e-12
        assert abs(celeba.squared_error(output, target)[task] - F.mse_loss(decoded[:, :3], target[task])) < 1e-12


def test_meta_training_makes_one_step_on_ten_pixels_worth_taking():
    """ModGrad on SYNTHETIC faces: adapted, it beats itself unadapted and the best constant colour of each image."""
    args = celeba.parse_flags(["--width", "32", "--context-dim", "32", "--inner-lr", "1", "--meta-lr", "3e-3",
                               "--outer-pixels", "128", "--device", "cpu"])
    torch.manual_seed(0)
    learner = celeba.build_learner(args, torch.device("cpu"))
    optimiser = torch.optim.Adam(learner.parameters(), lr=args.meta_lr)
    images, rng = torch.from_numpy(celeba.synthetic_split("train")), torch.Generator().manual_seed(0)
    for _ in range(400):
        celeba.meta_step(learner, optimiser, args, celeba.sample_tasks(images, args, rng), None)
    test = torch.from_numpy(celeba.synthetic_split("test"))
    error = lambda: float(np.mean(celeba.evaluate(learner, args, test, "test")))
    adapted, target = error(), celeba.colours(test)
    constant = (target - target.mean(1, keepdim=True)).square().mean()
    args.inner_lr = 0.0
    assert adapted < 0.9 * constant and adapted < 0.7 * error()      # measured: 0.70 and 0.52


# --- data ---

@pytest.fixture
def faces(tmp_path):
    """A tiny CelebA: images 1-3 of each official range, no partition file."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "celeba" / "img_align_celeba"
    folder.mkdir(parents=True)
    for start in (1, 162_771, 182_638):
        for number in range(start, start + 3):
            Image.fromarray(rng.integers(0, 256, (109, 89, 3), np.uint8)).save(folder / f"{number:06d}.jpg")
    return folder.parent


def test_the_partition_is_the_official_file_byte_by_byte():
    """md5 of list_eval_partition.txt as torchvision has it."""
    text = celeba.official_partition([f"{number:06d}.jpg" for number in range(1, 202_600)], Path())
    assert hashlib.md5(text).hexdigest() == "d32c9cbf5e040fd4025c592c306e6668"


def test_whole_images_are_resized_split_and_cached(faces, monkeypatch):
    splits = celeba.load_splits(faces.parent)
    assert {split: images.shape for split, images in splits.items()} == dict.fromkeys(celeba.SPLITS, (3, 32, 32, 3))
    with Image.open(faces / "img_align_celeba" / "162772.jpg") as image:
        assert np.array_equal(splits["val"][1], np.asarray(image.resize((32, 32), Image.LANCZOS)))
    assert not (faces / "list_eval_partition.txt").exists()         # more images may come
    monkeypatch.setattr(celeba, "read_image", None)                  # the second time nothing is decoded
    assert np.array_equal(celeba.load_splits(faces)["val"], splits["val"])


def test_a_given_partition_is_followed(faces):
    names = sorted(path.name for path in (faces / "img_align_celeba").iterdir())
    (faces / "list_eval_partition.txt").write_text("".join(f"{name} {k % 3}\n" for k, name in enumerate(names)) + "\n")
    assert [path.name for path in celeba.list_images(faces)["val"]] == names[1::3]


@pytest.mark.parametrize("break_it, message", [
    (lambda home: (home / "img_align_celeba" / "000002.jpg").write_bytes(b"no image"), "000002.jpg is not a readable"),
    (lambda home: (home / "list_eval_partition.txt").write_text("000001.jpg 3\n"), "line 1: '000001.jpg 3'"),
    (lambda home: (home / "list_eval_partition.txt").write_text("000009.jpg 0\n"), "line 1 lists 000009.jpg"),
    (lambda home: (home / "list_eval_partition.txt").write_text("000001.jpg 0\n" * 2), "more than once"),
    (lambda home: (home / "list_eval_partition.txt").write_text("000001.jpg 0\n"), "val split of list_eval_partition.txt has no image"),
    (lambda home: (home / "img_align_celeba" / "000000.jpg").write_bytes(b""), "000000.jpg is not named"),
    (lambda home: os.rename(home / "img_align_celeba", home / "images"), "looked for img_align_celeba"),
], ids=["unreadable", "wrong-number", "absent", "twice", "empty-split", "strange-name", "no-folder"])
def test_broken_data_is_named(faces, break_it, message):
    break_it(faces)
    with pytest.raises(DataError, match=message):
        celeba.load_splits(faces)


def test_download_checks_unpacks_and_trains(faces, tmp_path, monkeypatch):
    archive = tmp_path / "img_align_celeba.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in (faces / "img_align_celeba").iterdir():
            file.write(path, f"img_align_celeba/{path.name}")
    right = {"urls": [archive.as_uri()], "size": archive.stat().st_size,
             "sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
    monkeypatch.setattr(celeba, "ARCHIVE", {**right, "sha256": "0" * 64})
    with pytest.raises(UsageError, match="sha256"):
        celeba.download(tmp_path / "new")
    assert celeba.find_data(tmp_path / "new") is None
    monkeypatch.setattr(celeba, "ARCHIVE", right)
    result = here(*TINY, "--download", "--data", tmp_path / "new", "--out", tmp_path / "run")
    assert result["synthetic"] is False and result["split_sizes"] == dict.fromkeys(celeba.SPLITS, 3)


# --- runs ---

@pytest.fixture(scope="module")
def complete_run(tmp_path_factory):
    """An uninterrupted tiny run in a folder without data: (its folder, what it printed)."""
    return runs.complete("train_celeba.py", *TINY, home=tmp_path_factory.mktemp("home"))


def test_a_run_without_noise_may_go_on_on_another_kind_of_device(complete_run):
    """Whose generators have other states; tasks are drawn on the CPU everywhere."""
    assert "noise_rng" not in torch.load(complete_run[0] / "checkpoint.pt", weights_only=True)


def test_a_run_without_data_is_complete_and_says_synthetic(complete_run):
    run, printed = complete_run
    runs.assert_whole_and_synthetic(run, printed)
    result = runs.result(run)
    assert result["metric"] == "mse" and result["tasks"] == 6 and result["iterations"] == 12 and result["images"] == 48 and 0 < result["value"] < 1
    assert runs.logged(run, "iteration", "loss") == [3, 6, 9, 12]
    assert runs.logged(run, "iteration", "val_mse") == [6, 12]


@pytest.mark.parametrize("method", ["modgrad", "maml", "cavia", "cnp"])
def test_every_method_runs_and_the_figures_are_drawn(method, complete_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here(*TINY, "--method", method, "--pixels", 20, "--order", "ordered", "--out", "run")
    celeba.main(["--figure", "run", str(complete_run[0]), "--picture", "grid.png", "--device", "cpu"])
    Image.new("L", (60, 40), 128).save("photo.png")
    celeba.main(["--complete", "photo.png", "--checkpoint", "run", "--picture", "completed.png", "--device", "cpu"])
    for name in ("grid.png", "completed.png"):
        assert min(Image.open(name).size) > 100


def test_a_run_trained_with_triton_is_used_without_a_gpu(complete_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorded = json.loads((complete_run[0] / "config.json").read_text())
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(recorded | {"kernel": "triton"}))
    (tmp_path / "run/checkpoint.pt").write_bytes((complete_run[0] / "checkpoint.pt").read_bytes())
    celeba.main(["--figure", "run", "--picture", "grid.png", "--device", "cpu"])
    assert (tmp_path / "grid.png").exists()


def test_smoke_is_a_whole_run(tmp_path):
    assert here("--smoke", "--device", "cpu", "--threads", 1, "--out", tmp_path / "run")["tasks"] == 50


def test_the_rate_falls_as_a_cosine_when_asked():
    args = celeba.parse_flags(["--iterations", "100", "--meta-lr", "0.01"])
    assert celeba.meta_lr(args, 99) == 0.01
    args.meta_lr_schedule = "cosine"
    rates = [celeba.meta_lr(args, iteration) for iteration in (0, 50, 100)]
    assert rates == pytest.approx([0.01, 0.005, 0.0], abs=1e-12)     # float64 rounding of the cosine


def test_the_benchmark_compares_contenders_that_agree(capsys):
    celeba.main([*TINY, "--benchmark"])
    assert "ratio" in capsys.readouterr().out


RESUMED = [*TINY, "--iterations", "120", "--val-every", "60", "--checkpoint-every", "10", "--outer-pixels", "64",
           "--gradient-noise", "0.1"]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """What the interrupted runs must come to."""
    home = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)                                            # a folder without data: synthetic faces
        here(*RESUMED, "--out", "run")
    return home / "run"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_interrupted_run_resumes_to_the_same_numbers(number, whole_run, tmp_path):
    run = tmp_path / "run"
    runs.interrupt(number, "train_celeba.py", *RESUMED, out=run)
    done = script(*RESUMED, "--out", run, "--resume", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (run / "log.jsonl").read_text() == (whole_run / "log.jsonl").read_text()
    assert runs.result(run)["value"] == runs.result(whole_run)["value"]


def test_the_time_limit_stops_and_still_tests(tmp_path):
    result = here(*TINY, "--iterations", 100_000, "--max-minutes", 0.02, "--out", tmp_path / "run")
    assert 0 < result["iterations"] < 100_000 and result["tasks"] == 6


def test_a_run_is_not_overwritten_nor_resumed_as_another(complete_run, monkeypatch):
    run, _ = complete_run
    monkeypatch.chdir(run.parent)
    before = (run / "log.jsonl").read_text()
    with pytest.raises(UsageError, match="--resume"):
        celeba.main([*TINY, "--out", str(run)])
    with pytest.raises(UsageError, match="pixels"):
        celeba.main([*TINY, "--out", str(run), "--resume", "--pixels", "11"])
    assert (run / "log.jsonl").read_text() == before


@pytest.mark.parametrize("flags, message", [
    (["--pixels", "1025"], "--pixels is 1025, but an image has 1024"),
    (["--outer-pixels", "2000"], "--outer-pixels is 2000"),
    (["--adapt", "fc9.weight"], "fc9.weight"),
    (["--method", "cnp", "--inner-steps", "2"], "--inner-steps is for methods with an inner loop"),
    (["--method", "cnp", "--gradient-noise", "1"], "--gradient-noise is for methods with an inner loop"),
    (["--method", "cavia", "--adapt", "fc1.weight"], "nothing else"),
    (["--method", "maml", "--adapt", "context"], "maml adapts layers"),
    (["--picture", "completed.jpg"], "--picture completed.jpg"),
    (["--method", "maml", "--refine"], "--refine"),
    (["--method", "cavia", "--normalise-context"], "--normalise-context is for --method modgrad"),
    (["--data", "no/such/folder"], "no/such/folder"),
    (["--smoke", "--download"], "--smoke"),
    (["--kernel", "triton"], "triton"),
    (["--complete", "photo.jpg"], "--checkpoint"),
    (["--complete", "photo.jpg", "--checkpoint", "run", "--figure", "run"], "name one"),
    (["--complete", "no.jpg", "--checkpoint", "no"], "no.jpg is not a readable image"),
    (["--figure", "no/such/run"], "no/such/run holds no run"),
    (["--method", "cavia", "--benchmark"], "--benchmark"),
    (["--benchmark", "--gradient-noise", "0.1"], "no noise"),
    (["--meta-lr", "1e30"], "non-finite"),
])
def test_bad_input_is_named(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                                      # a folder without data: synthetic faces
    with pytest.raises(UsageError, match=message):
        celeba.main([*TINY, *flags, "--out", "run"])
    assert not Path("run/result.json").exists()


def test_bad_input_ends_in_one_line_and_status_2(tmp_path):
    done = script("--pixels", "0", cwd=tmp_path)
    assert done.returncode == 2 and "'0' is not an integer of at least 1" in done.stderr.splitlines()[-1]
    done = script("--pixels", "1025", cwd=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "Traceback" not in done.stderr


@pytest.mark.skipif("MODGRAD_DATA" not in os.environ, reason="MODGRAD_DATA names no folder with real data")
def test_the_real_faces_train(tmp_path):
    result = here("--data", Path(os.environ["MODGRAD_DATA"]) / "celeba", "--iterations", 60, "--outer-pixels", 128,
                  "--val-images", 50, "--test-images", 200, "--threads", 1, "--device", "cpu",
                  "--out", tmp_path / "run")
    assert result["synthetic"] is False
    assert result["value"] < 0.08                                    # a constant grey is off by more than 0.09
