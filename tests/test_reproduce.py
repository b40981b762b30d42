"""The queue that runs the whole paper: every command is one, and the queue ends, resumes and names what failed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common
import runs
import train_celeba
import train_miniimagenet
import train_omniglot
import train_rl

sys.path.insert(0, str(runs.ROOT / "results"))
import reproduce  # noqa: E402

SCRIPTS = {"train_miniimagenet.py": train_miniimagenet, "train_celeba.py": train_celeba, "train_omniglot.py": train_omniglot,
           "train_rl.py": train_rl}
TINY = "train_celeba.py --smoke --iterations 4"
ENDLESS = "train_celeba.py --smoke --iterations 1000000 --checkpoint-every 5 --val-every 1000000"


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Call it with {name: command} and flags: the queue runs these on a CPU, below tmp_path."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def call(commands, *flags):
        monkeypatch.setattr(reproduce, "cells", lambda: {name: (command, "0.034") for name, command in commands.items()})
        monkeypatch.chdir(tmp_path)            # where there is no data
        reproduce.main([*map(str, flags), "--into", "paper", "--synthetic"])
        return tmp_path / "paper"

    return call


@pytest.mark.parametrize("gpu", [False, True], ids=["cpu", "gpu"])
def test_every_command_is_one_that_its_script_takes(gpu):
    args = reproduce.argparse.Namespace(into=Path("runs/paper"), gpu=gpu, seed=3)
    folders = set()
    for name in reproduce.cells():
        words = reproduce.command_of(name, args)
        flags = SCRIPTS[words[0]].parse_flags(words[1:])
        folders.add(flags.out)
        assert flags.seed == 3 and flags.resume and not flags.smoke and flags.max_minutes is None, name
        length = next(value for unit in reproduce.UNITS if (value := getattr(flags, f"{unit}s", None)))
        assert length == {"fig5": 1000, "fig8": 500}.get(name[:4], 100_000 if "resnet34" in name else
                                                         60_000 if "pretrain" in name else 50_000), name
    assert folders == {f"runs/paper/{name}" for name in reproduce.cells()}


def test_the_paper_is_covered():
    """Fig. 7 shows completions of Table 3's runs; what is left out of Tables 4 and 5 is Table 2's."""
    names = set(reproduce.cells())
    parts = {name.split("-")[0] for name in names}
    assert parts == {"table2", "table3", "table4", "table5", "fig5", "fig6", "fig8", "fig9"}
    assert {f"table4-steps{k}-{shots}shot" for k in (2, 3, 4, 5) for shots in (5, 1)} <= names
    assert {f"table5-rank{u}-{shots}shot" for u in (1, 10) for shots in (5, 1)} <= names
    assert {f"table3-{order}{pixels}-{method}" for order in ("random", "ordered") for pixels in (10, 100)
            for method in ("modgrad", "cavia", "maml", "cnp")} <= names


def test_the_list_has_our_number_beside_the_papers(queue, capsys):
    commands = {"one": TINY, "two": f"{TINY} --seed 2", "other": TINY}
    home = queue(commands, "one", "tw*", "--jobs", 2)
    for name in ("one", "two"):
        result = runs.result(home / name)
        assert result["iterations"] == 4 and result["config"]["threads"] == 1
    assert not (home / "other").exists()
    value = runs.result(home / "one")["value"]
    capsys.readouterr()
    queue(commands)
    head, one, two, other = capsys.readouterr().out.splitlines()
    assert one.split()[:5] == ["one", "SYNTHETIC", f"{value:.4f}", "±", f"{runs.result(home / 'one')['ci95']:.4f}"]
    assert "0.034" in one and one.endswith(f"python {TINY}") and other.split()[:3] == ["other", "-", "0.034"]


def test_what_is_done_is_not_run_again(queue):
    home = queue({"one": TINY}, "all")
    before = (home / "one.txt").read_text(), (home / "one/result.json").stat().st_mtime_ns
    queue({"one": TINY}, "all")
    assert ((home / "one.txt").read_text(), (home / "one/result.json").stat().st_mtime_ns) == before


def test_a_damaged_result_is_told_in_the_list(queue, capsys):
    home = queue({"one": TINY}, "all")
    (home / "one/result.json").write_text("{")
    capsys.readouterr()
    queue({"one": TINY})
    assert "one/result.json cannot be read" in capsys.readouterr().out


def test_a_result_of_other_settings_is_not_done(queue, capsys):
    queue({"one": TINY}, "all")
    with pytest.raises(common.UsageError, match="1 of 1 runs failed"):
        queue({"one": TINY}, "all", "--seed", 2)
    assert "with other settings (seed 1)" in capsys.readouterr().out
    queue({"one": f"{TINY} --inner-lr 3"})
    assert "with other settings (inner_lr 10.0)" in capsys.readouterr().out


def test_a_failure_is_named_and_keeps_no_other_run_from_its_end(queue, tmp_path, capsys):
    with pytest.raises(common.UsageError, match=r"1 of 2 runs failed \(bad\)"):
        queue({"bad": f"{TINY} --pixels 5000", "good": TINY}, "all")
    assert "bad: ended with 2, see paper/bad.txt" in capsys.readouterr().out
    assert runs.result(tmp_path / "paper/good")["iterations"] == 4


def test_an_unknown_name_is_refused(queue):
    with pytest.raises(common.UsageError, match="no run is named fig99"):
        queue({"one": TINY}, "fig99")


def test_what_starts_from_another_run_waits_for_it_and_fails_with_it(queue, tmp_path):
    small = "train_miniimagenet.py --smoke --backbone wrn28-10 --channels 4 --image-size 16"
    after = f"{small} --start-from INTO/{reproduce.PRETRAINED} --freeze-prefix"
    with pytest.raises(common.UsageError, match="2 of 2 runs failed"):
        queue({"after": after, reproduce.PRETRAINED: f"{small} --method pretrain --ways 99"}, "after")
    assert not (tmp_path / "paper/after").exists()
    (tmp_path / "paper" / f"{reproduce.PRETRAINED}.txt").unlink()
    home = queue({"after": after, reproduce.PRETRAINED: f"{small} --method pretrain --updates 2"}, "after", "--jobs", 2)
    assert runs.result(home / "after")["config"]["start_from"] == f"paper/{reproduce.PRETRAINED}"


def test_ctrl_c_leaves_checkpoints_from_which_the_queue_goes_on(queue, tmp_path, monkeypatch, capsys):
    checkpoint = tmp_path / "paper/long/checkpoint.pt"
    deadline = time.monotonic() + 120

    def press_when_saved(seconds):
        if reproduce.trained_minutes(checkpoint.parent) > 0.03:
            raise KeyboardInterrupt
        assert time.monotonic() < deadline

    with monkeypatch.context() as patch:
        patch.setattr(reproduce.time, "sleep", press_when_saved)
        with pytest.raises(KeyboardInterrupt):
            queue({"long": ENDLESS}, "all")
    before = torch.load(checkpoint, weights_only=True)["now"]
    assert "interrupted" in (tmp_path / "paper/long.txt").read_text() and not (checkpoint.parent / "result.json").exists()
    queue({"long": ENDLESS}, "all", "--minutes", 0.05)      # on top of what was trained
    limit = float((tmp_path / "paper/long.txt").read_text().split("--max-minutes ")[1].split()[0])
    assert 0.04 < limit - before["seconds"] / 60 < 0.051
    result = runs.result(checkpoint.parent)
    assert before["iteration"] < result["iterations"] < 1_000_000
    capsys.readouterr()
    queue({"long": ENDLESS})
    assert f"after {result['iterations']:,} of 1,000,000 iterations  0.034" in capsys.readouterr().out


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="this system has no SIGHUP")
def test_no_run_outlives_the_terminal(tmp_path):
    said = tmp_path / "fig8-nav-maml.txt"
    queue = subprocess.Popen([sys.executable, str(runs.ROOT / "results/reproduce.py"), "fig8-nav-maml", "--into", str(tmp_path)],
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=runs.ON_CPU)
    deadline = time.monotonic() + 120
    while not (said.exists() and "iterations:" in said.read_text()):
        assert queue.poll() is None and time.monotonic() < deadline, queue.communicate()
        time.sleep(0.01)
    os.kill(queue.pid, signal.SIGHUP)
    queue.communicate(timeout=120)
    assert queue.returncode == 130 and "interrupted" in said.read_text() and (tmp_path / "fig8-nav-maml/checkpoint.pt").exists()


def test_no_run_outlives_a_failure_of_the_queue(queue, tmp_path, monkeypatch):
    def fail_when_begun(seconds):
        if (tmp_path / "paper/long/checkpoint.pt").exists():
            raise ZeroDivisionError
    monkeypatch.setattr(reproduce.time, "sleep", fail_when_begun)
    with pytest.raises(ZeroDivisionError):
        queue({"long": ENDLESS}, "all")
    assert "interrupted" in (tmp_path / "paper/long.txt").read_text()


def test_a_result_that_is_not_finite_is_listed(queue, tmp_path, capsys):
    run = tmp_path / "paper/one"
    run.mkdir(parents=True)
    common.write_result(run, torch.device("cpu"), {"metric": "mse", "value": float("nan"), "ci95": float("inf"), "iterations": 4,
                                                   "config": {"iterations": 4}})
    queue({"one": TINY})
    assert "one  not finite  0.034" in capsys.readouterr().out


def test_without_data_nothing_runs_unless_it_may_be_synthetic(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.UsageError, match=r"without data/celeba \(`python train_celeba.py --download` fetches it\) these runs"):
        reproduce.main(["table3-random10-modgrad"])
    assert not list(tmp_path.iterdir())
    for folder in ("data/celeba", "data/mini-imagenet/.download", "data/omniglot/cache"):       # of a download that failed
        (tmp_path / folder).mkdir(parents=True)
    for name in ("table3-random10-modgrad", "table2-modgrad-5shot", "fig5-leap"):
        with pytest.raises(common.UsageError, match="these runs would be on SYNTHETIC data"):
            reproduce.main([name])


def test_a_dry_run_prints_and_runs_nothing(queue, tmp_path, capsys):
    queue({"one": TINY}, "one", "--dry-run")
    assert capsys.readouterr().out == f"python {TINY} --device cpu --threads 1 --seed 1 --out paper/one --resume\n"
    assert not (tmp_path / "paper").exists()
