"""Several processes share one run: the numbers of one process, one set of files, and no hang when a process is lost."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import common
import train_miniimagenet as mini
from runs import ROOT, result, weights
from test_train_miniimagenet import TINY

# Meta-batches of 3 on 2 ranks are uneven, the last one has a single task (rank 1 has none); 3 evaluation batches. Random crops
# and colours are drawn for all tasks, whichever rank has them.
FLAGS = [*TINY, "--episodes", "25", "--meta-batch", "3", "--eval-batch", "2", "--threads", "1", "--device", "cpu", "--augment"]
FEW_THREADS = {**os.environ, "OMP_NUM_THREADS": "1"}

SIGNAL_IN_STEP_5 = """
import os, sys, common, train_miniimagenet as mini
number, real, step = int(sys.argv.pop(1)), mini.meta_step, 0
def meta_step(*args):
    global step
    step += 1
    if step == 5 and common.rank() == 1:
        os.kill(os.getpid(), number)
    return real(*args)
mini.meta_step = meta_step
common.run_main(mini.main, several_devices=True)
"""


def one_process(*flags):
    with contextlib.chdir(Path(flags[-1]).parent):      # where there is no data
        mini.main([*FLAGS, *map(str, flags)])


def two_processes(program, *flags, cwd):
    """Run `program` on two gloo ranks without torchrun, which would end the survivor: [(status, stderr), ...]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [subprocess.Popen(
        [sys.executable, "-c", program, *map(str, flags)], cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env={**FEW_THREADS, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "PYTHONPATH": str(ROOT),
                        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}) for r in range(2)]
    try:
        return [(p, p.communicate(timeout=240)[1]) for p in started]      # far below the 30 minutes of a hang
    finally:
        for p in started:
            p.kill()


def assert_same_run(run, expected):
    """Equal up to the order of float32 sums, 1e-7 of the largest term.

    Adam divides by the gradient's size, so that rounding moves a component that nearly cancels by 1e-3 or so of its way,
    which is 1e-3 an update, over 9 updates: 1e-5 (seen: 1.02e-5). Batch norm cancels a convolution's bias: its gradient is
    rounding alone, and it may go anywhere without changing an output.
    """
    ours, theirs = common.read_log(run), common.read_log(expected)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for line, other in zip(ours, theirs):
        assert line == pytest.approx(other, rel=1e-5), (line, other)
    expected_weights = weights(expected)
    for name, t in weights(run).items():
        if name not in {f"{conv}.bias" for conv in mini.CONVS}:
            torch.testing.assert_close(t, expected_weights[name], rtol=0, atol=3e-5, msg=lambda text: f"{name}: {text}")
    assert all(result(run)[name] == result(expected)[name] for name in ("value", "ci95"))


@pytest.fixture(scope="module")
def one_rank_run(tmp_path_factory):
    run = tmp_path_factory.mktemp("one") / "run"
    one_process("--out", run)
    return run


def test_two_ranks_give_the_numbers_and_the_files_of_one(one_rank_run, tmp_path):
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                           str(ROOT / "train_miniimagenet.py"), *FLAGS, "--out", str(tmp_path / "run")], cwd=tmp_path,
                          env=FEW_THREADS, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", one_rank_run)
    names = [sorted(p.name for p in run.iterdir()) for run in (tmp_path / "run", one_rank_run)]
    assert names[0] == names[1]
    assert len(done.stdout.splitlines()) == 3, done.stdout      # data, settings, accuracy: rank 0 alone speaks
    assert result(tmp_path / "run")["ranks"] == 2


def test_running_out_of_memory_is_not_blamed_on_another_process(monkeypatch):
    monkeypatch.setattr(common, "ranks", lambda: 2)
    def full(tensors):
        raise torch.OutOfMemoryError("out of memory")
    monkeypatch.setattr(torch, "cat", full)
    with pytest.raises(torch.OutOfMemoryError):
        common.sum_over_ranks([torch.ones(1)])


def test_a_killed_rank_ends_the_other_and_one_process_completes_the_run(one_rank_run, tmp_path):
    run = tmp_path / "run"
    ended = two_processes(SIGNAL_IN_STEP_5, int(signal.SIGKILL), *FLAGS, "--out", run, cwd=tmp_path)
    (first, said), (second, _) = ended
    assert second.returncode == -signal.SIGKILL
    assert first.returncode == 2 and "another process of this run ended" in said.splitlines()[-1], said
    assert "Traceback" not in said and not (run / "result.json").exists()
    one_process("--resume", "--out", run)
    assert_same_run(run, one_rank_run)


def test_a_signal_to_one_rank_stops_both_after_the_same_step_and_two_ranks_resume(one_rank_run, tmp_path):
    run = tmp_path / "run"
    again = "import common, train_miniimagenet as mini; common.run_main(mini.main, several_devices=True)"
    ended = two_processes(SIGNAL_IN_STEP_5, int(signal.SIGTERM), *FLAGS, "--out", run, cwd=tmp_path)
    assert [p.returncode for p, _ in ended] == [130, 130], ended
    assert torch.load(run / "checkpoint.pt", weights_only=True)["now"]["episode"] == 15
    ended = two_processes(again, *FLAGS, "--resume", "--out", run, cwd=tmp_path)
    assert [p.returncode for p, _ in ended] == [0, 0], ended
    assert_same_run(run, one_rank_run)


HELPERS = """
import os, sys, torch, common
from pathlib import Path
mark = Path("mark")

def main():
    me = common.rank()
    p = torch.ones(2, requires_grad=True)
    if me == 0:
        p.grad = torch.tensor([1.0, 2.0])
    totals = torch.tensor([3.0 + me])
    common.sum_gradients([p], totals)
    assert p.grad.tolist() == [1, 2] and totals.tolist() == [7], (p.grad, totals)
    assert common.max_over_ranks(3 - me) == 3
    assert common.from_first_rank(os.getpid) == os.getpid() or me == 1
    assert common.from_first_rank(lambda: me) == 0
    with common.first_of_machine():
        assert mark.exists() == (me == 1)
        mark.touch()
    with common.stop_signal(max_minutes=1, spent_seconds=61 * me) as stop:      # only rank 1's time is up
        assert stop.requested() and stop.reason == "time"
    if me == 1:
        raise common.UsageError("rank 1 found something wrong")
    common.sum_over_ranks([torch.ones(1)])

common.run_main(main, several_devices=True)
"""


def test_ranks_agree_and_the_first_error_is_the_only_one_printed(tmp_path):
    (first, said), (second, also_said) = two_processes(HELPERS, cwd=tmp_path)
    assert said + also_said == "error: rank 1 found something wrong\n"
    assert (first.returncode, second.returncode) == (2, 2)


def test_a_first_signal_after_another_ranks_is_no_second_one(monkeypatch):
    monkeypatch.setattr(common, "max_over_ranks", lambda value: 2)
    with common.stop_signal() as stop:
        assert stop.requested() and stop.reason == "signal"
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_each_rank_has_its_own_gpu(monkeypatch):
    monkeypatch.setattr(common, "ranks", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [str(common._device(name)) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(common.UsageError, match="--device cuda:0"):
        common._device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(common.UsageError, match="2 CUDA device"):
        common._device("auto")


def test_a_script_for_one_device_is_refused_under_torchrun(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        common.run_main(lambda: None)
    assert stopped.value.code == 2 and "without torchrun" in capsys.readouterr().err
