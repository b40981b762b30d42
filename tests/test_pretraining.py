"""Two stages on residual networks: a classifier of all training classes, then meta-training from its weights."""

import contextlib
import signal
from pathlib import Path

import pytest
import torch

import runs
import train_miniimagenet as mini
from test_train_miniimagenet import SMALL, TINY, script

WRN = [*TINY, "--backbone", "wrn28-10", "--channels", "4", "--meta-batch", "2", "--threads", "1"]
PRETRAIN = [*SMALL, "--method", "pretrain", "--batch-size", "16", "--updates", "24", "--augment", "--threads", "1"]


def run_script(*flags, out):
    with contextlib.chdir(out.parent):      # where there is no data
        mini.main([*map(str, flags), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A small WRN-28 after 24 updates."""
    return run_script(*PRETRAIN, "--backbone", "wrn28-10", "--channels", "4", out=tmp_path_factory.mktemp("home") / "wrn")


def test_pretraining_is_a_whole_run(pretrained):
    result = runs.result(pretrained)
    assert result["updates"] == 24 and result["best_update"] in (12, 24) and result["tasks"] == 6
    assert result["synthetic"] and result["config"]["adapt"] == [] and result["config"]["meta_lr"] == 0.1
    assert runs.logged(pretrained, "update", "loss") == [6, 12, 18, 24]
    assert runs.logged(pretrained, "update", "val_accuracy") == [12, 24]
    assert runs.weights(pretrained)["head.weight"].shape == (64, 16)
    assert (pretrained / "curves.png").exists()


def test_pretraining_learns_features_for_other_classes(tmp_path):
    """Nearest class means of unseen classes, well above those of an untrained network of the same flags."""
    flags = ["--method", "pretrain", "--image-size", "32", "--channels", "32", "--batch-size", "32", "--test-episodes", "60",
             "--val-episodes", "20", "--val-every", "100", "--threads", "1"]
    trained = runs.result(run_script(*flags, "--updates", "100", "--meta-lr", "0.03", out=tmp_path / "trained"))
    untrained = runs.result(run_script(*flags, "--updates", "1", "--meta-lr", "1e-9", out=tmp_path / "untrained"))
    assert trained["value"] - trained["ci95"] > untrained["value"] + untrained["ci95"] + 0.05


def test_a_killed_pretraining_resumes_to_the_same_numbers(tmp_path):
    complete = run_script(*PRETRAIN, out=tmp_path / "complete")
    run = tmp_path / "run"
    runs.interrupt(signal.SIGKILL, "train_miniimagenet.py", *PRETRAIN, out=run, log_lines=2)
    run_script(*PRETRAIN, "--resume", out=run)
    assert (run / "log.jsonl").read_text() == (complete / "log.jsonl").read_text()
    expected = runs.weights(complete)
    assert all(torch.equal(expected[name], t) for name, t in runs.weights(run).items())
    assert runs.result(run)["value"] == runs.result(complete)["value"]


def test_meta_training_starts_there_and_keeps_the_prefix(pretrained, tmp_path):
    run = run_script(*WRN, "--start-from", pretrained, "--freeze-prefix", out=tmp_path / "run")
    best = torch.load(pretrained / "checkpoint.pt", weights_only=True)["now"]["best"]["theta"]
    after = runs.weights(run)
    learned = {name for name, t in best.items() if not torch.equal(after[name], t)}
    expected = {f"layer3.3.{name}" for name in ("conv1.weight", "conv2.weight", "bn1.weight", "bn1.bias", "bn2.weight", "bn2.bias")}
    assert learned == expected | {"bn.weight", "bn.bias", "head.weight", "head.bias"}
    assert runs.result(run)["config"]["adapt"] == ["layer3.3.conv1.weight", "layer3.3.conv2.weight"]
    (pretrained / "checkpoint.pt").rename(tmp_path / "moved")       # a resumed run does not need it
    try:
        run_script(*WRN, "--start-from", pretrained, "--freeze-prefix", "--resume", out=run)
    finally:
        (tmp_path / "moved").rename(pretrained / "checkpoint.pt")


def test_without_freezing_everything_learns(pretrained, tmp_path):
    run = run_script(*WRN, "--start-from", pretrained, "--episodes", "4", out=tmp_path / "run")
    best = torch.load(pretrained / "checkpoint.pt", weights_only=True)["now"]["best"]["theta"]
    assert not any(torch.equal(t, best[name]) for name, t in runs.weights(run).items() if name in best)


def test_a_start_may_be_a_file_of_tensors_and_brings_a_head_that_fits(tmp_path):
    args = mini.parse_flags([*WRN, "--method", "maml"])
    source, target = (mini.build_learner(args, torch.device("cpu")) for _ in range(2))
    torch.save({name: t.detach() for name, t in source.theta.items()} | {"unused.running_mean": torch.zeros(1)}, tmp_path / "w.pt")
    mini.start_from(target, tmp_path / "w.pt")
    assert all(torch.equal(t, source.theta[name]) for name, t in target.theta.items())


def test_resnet34_runs_first_order_with_all_its_tensors(tmp_path):
    run = run_script(*TINY, "--backbone", "resnet34", "--image-size", "32", "--channels", "4", "--method", "fomaml", "--inner-steps",
                     "2", "--episodes", "4", "--meta-batch", "2", "--threads", "1", out=tmp_path / "run")
    adapted = runs.result(run)["config"]["adapt"]
    assert set(adapted) == set(torch.load(run / "checkpoint.pt", weights_only=True)["weights"]["theta"]) and len(adapted) == 110


def test_the_nearest_mean_wins():
    g = torch.Generator().manual_seed(0)
    support, query = torch.randn(2, 6, 4, generator=g), torch.randn(2, 5, 4, generator=g)
    labels = torch.arange(3).repeat(2, 2)
    out = mini.nearest_mean(support, query, labels, 3)
    for t in range(2):
        means = torch.stack([(support[t, c] + support[t, c + 3]) / 2 for c in range(3)])
        torch.testing.assert_close(out[t], -(query[t][:, None] - means).norm(dim=2))


@pytest.mark.parametrize("flags, message", [
    (["--batch-size", "3"], "--batch-size is for --method pretrain"),
    (["--updates", "3"], "--updates is for --method pretrain"),
    (["--method", "pretrain", "--adapt", "head.weight"], "--adapt is for meta-training"),
    (["--method", "pretrain", "--compile"], "--compile is for meta-training"),
    (["--method", "pretrain", "--meta-batch", "5"], "--meta-batch is for meta-training"),
    (["--method", "pretrain", "--refine"], "--refine"),
    (["--freeze-prefix"], "--start-from"),
    (["--start-from", "no/such/run"], "no/such/run cannot be read as weights"),
    (["--start-from", "no/such/run", "--freeze-prefix", "--method", "maml"], "nothing lies before conv1.weight"),
    (["--backbone", "resnet34", "--image-size", "24"], "at least 32"),
    (["--backbone", "resnet34", "--image-size", "24", "--method", "maml"], "at least 32"),
])
def test_bad_flags_end_in_one_clear_line(flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*(SMALL if "pretrain" in flags else TINY), *flags, "--out", "run"]
    assert message in runs.refusal(mini.main, *flags)
    assert not Path("run").exists()


def test_a_start_of_another_network_is_refused(pretrained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = runs.refusal(mini.main, *WRN, "--channels", "8", "--start-from", pretrained, "--out", "run")
    assert "layer1.0.conv1.weight should be (8, 16, 3, 3), it has (4, 16, 3, 3)" in said
    assert not Path("run").exists()
