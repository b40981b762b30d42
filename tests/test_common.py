"""Run folders, checkpoints, signals, downloads and archives: where something goes wrong, nothing is lost."""

import argparse
import errno
import hashlib
import http.server
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import train_celeba as celeba
import train_miniimagenet as mini
import train_omniglot as omniglot
import train_rl as rl
from common import DataError, DownloadError, UsageError

ROOT = Path(__file__).resolve().parent.parent


# --- device ---

def test_places_in_images_keep_float32s_bits_under_tf32(monkeypatch):
    allowed, affine_grid = [], F.affine_grid
    monkeypatch.setattr(F, "affine_grid", lambda *a, **k: allowed.append(torch.backends.cuda.matmul.allow_tf32) or affine_grid(*a, **k))
    common.allow_tf32(True)
    try:
        mini.augment(torch.zeros(1, 2, 3, 8, 8, dtype=torch.uint8), torch.rand(1, 2, 8), 8)
        omniglot.move(torch.zeros(1, 2, 1, 8, 8), torch.eye(2, 3).expand(1, 2, 2, 3))
        assert allowed == [False, False] and torch.backends.cuda.matmul.allow_tf32
    finally:
        common.allow_tf32(False)


# --- run folder ---

def test_a_run_is_resumed_from_its_checkpoint_with_the_log_cut_back(tmp_path):
    run, checkpoint = common.open_run(tmp_path / "run", {"seed": 1}, resume=False)
    assert checkpoint is None
    common.append_log(run, {"episode": 1, "loss": 0.5})
    common.save_checkpoint(run, {"step": 1, "weights": torch.ones(2)})
    common.append_log(run, {"episode": 2, "loss": 0.25})
    (run / "checkpoint.pt.7.tmp").write_bytes(b"half")
    run, checkpoint = common.open_run(run, {"seed": 1}, resume=True)
    assert checkpoint["step"] == 1 and torch.equal(checkpoint["weights"], torch.ones(2))
    assert common.read_log(run) == [{"episode": 1, "loss": 0.5}]
    assert not list(run.glob("*.tmp"))


def test_a_run_is_neither_overwritten_nor_continued_with_other_settings(tmp_path):
    common.open_run(tmp_path, {"seed": 1, "threads": 1}, resume=False)
    common.save_checkpoint(tmp_path, {})
    with pytest.raises(UsageError, match="--resume"):
        common.open_run(tmp_path, {"seed": 1}, resume=False)
    with pytest.raises(UsageError, match="seed was 1, is 2"):
        common.open_run(tmp_path, {"seed": 2, "threads": 1}, resume=True)
    common.open_run(tmp_path, {"seed": 1, "threads": 2}, resume=True)


def test_a_flag_younger_than_the_run_is_another_setting_only_if_it_is_on(tmp_path):
    common.open_run(tmp_path, {"seed": 1}, resume=False)
    common.save_checkpoint(tmp_path, {})
    common.open_run(tmp_path, {"seed": 1, "hide_x": False, "rate": None}, resume=True)
    with pytest.raises(UsageError, match="hide_x was None, is True"):
        common.open_run(tmp_path, {"seed": 1, "hide_x": True}, resume=True)


def test_resume_without_a_checkpoint_starts_afresh_and_says_so(tmp_path, capsys):
    assert common.open_run(tmp_path / "run", {}, resume=True)[1] is None
    assert "nothing to resume" in capsys.readouterr().err


def test_resume_overwrites_no_finished_run_and_no_run_with_other_settings(tmp_path):
    common.open_run(tmp_path, {"seed": 1}, resume=False)
    common.append_log(tmp_path, {"episode": 1})
    with pytest.raises(UsageError, match="seed was 1, is 2"):
        common.open_run(tmp_path, {"seed": 2}, resume=True)
    assert common.read_log(tmp_path)
    (tmp_path / "result.json").write_text("{}")
    for resume, message in ((True, "finished run without its checkpoint"), (False, "already holds a run")):
        with pytest.raises(UsageError, match=message):
            common.open_run(tmp_path, {"seed": 1}, resume)
    (tmp_path / "result.json").unlink()
    assert common.open_run(tmp_path, {"seed": 1}, resume=True)[1] is None and not common.read_log(tmp_path)
    assert (tmp_path / "log.jsonl.old").read_text() == '{"episode": 1}\n'      # of what the checkpoint is lost


@pytest.mark.parametrize("name", ["log.jsonl", "result.json", "checkpoint.pt", "notes.tmp", "my.notes.tmp", "checkpoint.pt.tmp"])
def test_a_folders_other_files_are_left_alone(name, tmp_path):
    (tmp_path / name).write_text("mine")
    try:
        common.open_run(tmp_path, {}, resume=False)
    except UsageError as error:
        assert f"already holds a run ({name})" in str(error) and not (tmp_path / "config.json").exists()
    else:
        assert name.endswith(".tmp")
    assert (tmp_path / name).read_text() == "mine"


def test_flags_beside_smoke_count():
    for script, flags, expected in ((mini, ["--episodes", "100", "--image-size", "64"], {"episodes": 100, "image_size": 64, "channels": 16}),
                                    (mini, ["--method", "pretrain"], {"episodes": None, "updates": 24}),
                                    (omniglot, ["--test-steps", "7"], {"inner_steps": 10, "test_steps": 7, "meta_steps": 6}),
                                    (celeba, ["--iterations", "3"], {"iterations": 3, "val_every": 20}),
                                    (rl, ["--env", "nav", "--iterations", "2"], {"iterations": 2, "meta_batch": 4})):
        args = script.parse_flags(["--smoke", *flags])
        assert {name: getattr(args, name) for name in expected} == expected and args.out.endswith("-smoke")


def test_a_damaged_checkpoint_is_named(tmp_path):
    common.open_run(tmp_path, {}, resume=False)
    (tmp_path / "checkpoint.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(UsageError, match="checkpoint.pt cannot be read"):
        common.open_run(tmp_path, {}, resume=True)


@pytest.mark.parametrize("name, content", [("config.json", None), ("config.json", b"{"), ("log.jsonl", None), ("log.jsonl", b"")])
def test_a_file_of_the_run_that_is_lost_or_damaged_is_named(name, content, tmp_path):
    run, _ = common.open_run(tmp_path / "run", {}, resume=False)
    common.append_log(run, {"episode": 1})
    common.save_checkpoint(run, {})
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    with pytest.raises(UsageError, match=name):
        common.open_run(run, {}, resume=True)


def test_a_file_in_the_place_of_the_run_folder_is_named(tmp_path):
    (tmp_path / "run").write_bytes(b"")
    with pytest.raises(UsageError, match="--out .*run cannot be a folder"):
        common.open_run(tmp_path / "run", {}, resume=False)


def test_a_kill_while_writing_leaves_the_old_checkpoint(tmp_path):
    script = """
import os, signal, sys, torch, common
from pathlib import Path
run, _ = common.open_run(sys.argv[1], {}, False)
common.save_checkpoint(run, {"step": 1})
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
common.save_checkpoint(run, {"step": 2})
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("checkpoint.pt.*.tmp"))
    assert common.open_run(tmp_path, {}, resume=True)[1]["step"] == 1


LOCKS = pytest.mark.skipif(common.fcntl is None, reason="this system has no fcntl")


@LOCKS
def test_two_processes_do_not_train_in_one_folder(tmp_path):
    opens = [sys.executable, "-c", "import common, sys; common.run_main(lambda: common.open_run(sys.argv[1], {}, True))", str(tmp_path)]
    other = lambda: subprocess.run(opens, cwd=ROOT, capture_output=True, text=True)
    assert other().returncode == 0                                # it ended, and its lock with it
    run, _ = common.open_run(tmp_path, {}, resume=True)
    common.open_run(tmp_path, {}, resume=True)                    # this process may
    common.append_log(run, {"unit": 1})
    refused = other()
    assert refused.returncode == 2 and refused.stderr == (
        f"error: another process is at work in {tmp_path}: wait for it or stop it, or choose another --out\n")
    assert common.read_log(run) == [{"unit": 1}]
    Descent().train(tmp_path, resume=True)
    assert other().returncode == 0


@LOCKS
def test_a_file_system_without_locks_is_no_hindrance(tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(common.fcntl, "flock", refuse)
    files = lambda: len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    before = files()
    Descent().train(tmp_path)
    assert common.read_log(tmp_path) and files() == before


def test_a_full_disk_is_named_and_the_old_checkpoint_kept(tmp_path, monkeypatch):
    common.open_run(tmp_path, {}, resume=False)
    common.save_checkpoint(tmp_path, {"step": 1})

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UsageError, match="disk is full"):
        common.save_checkpoint(tmp_path, {"step": 2})
    assert not list(tmp_path.glob("*.tmp"))
    assert common.open_run(tmp_path, {}, resume=True)[1]["step"] == 1


def test_two_processes_may_write_one_file_at_once(tmp_path):
    other = "import common, sys; common.save_atomically(sys.argv[1], lambda file: file.write(b'other'))"

    def write(file):
        file.write(b"ours")
        subprocess.run([sys.executable, "-c", other, str(tmp_path / "cache")], cwd=ROOT, check=True)
    common.save_atomically(tmp_path / "cache", write)
    assert (tmp_path / "cache").read_bytes() == b"ours"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_torch_writing_to_a_full_device_is_named(tmp_path, monkeypatch):
    common.open_run(tmp_path, {}, resume=False)
    real_open = open
    monkeypatch.setattr("builtins.open", lambda path, *a, **k: real_open(
        "/dev/full" if str(path).endswith(".tmp") else path, *a, **k))
    with pytest.raises(UsageError, match="disk is full"):
        common.save_checkpoint(tmp_path, {"weights": torch.zeros(100_000)})


def test_a_disk_that_fills_within_a_checkpoint_is_named(tmp_path):
    """As torch.save writes on after the failure, its own message says nothing of it."""
    resource = pytest.importorskip("resource")
    common.open_run(tmp_path, {}, resume=False)
    common.append_log(tmp_path, {"step": 1})
    common.save_checkpoint(tmp_path, {"step": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
        with pytest.raises(UsageError, match="disk is full.* use --resume"):
            common.save_checkpoint(tmp_path, {"step": 2, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 1 and not list(tmp_path.glob("*.tmp"))


def test_the_log_refuses_numbers_that_are_not_finite(tmp_path):
    common.open_run(tmp_path, {}, resume=False)
    with pytest.raises(ValueError):
        common.append_log(tmp_path, {"loss": float("nan")})
    assert common.read_log(tmp_path) == []
    with pytest.raises(UsageError, match="non-finite loss .inf. at step 3"):
        common.check_finite(float("inf"), "loss", "step 3", tmp_path)


def test_result_json_names_the_machine(tmp_path):
    common.write_result(tmp_path, torch.device("cpu"), {"metric": "accuracy", "value": 0.5})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["value"] == 0.5 and result["device_name"] and result["threads"] >= 1
    assert result["versions"]["torch"] == torch.__version__ and result["peak_memory_bytes"] > 1e7


def test_a_machine_without_git_still_gets_its_result(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    common.write_result(tmp_path, torch.device("cpu"), {})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["commit"] is None and result["dirty"] is None and "non_finite" not in result


def test_a_number_that_is_not_finite_does_not_cost_the_result(tmp_path, capsys):
    common.write_result(tmp_path, torch.device("cpu"), {"value": float("inf"), "curves": {"loss": [1.0, float("nan")]}})
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["value"], result["curves"], result["non_finite"]) == (None, {"loss": [1.0, None]}, 2)
    assert "2 number(s)" in capsys.readouterr().err


def test_curves_are_a_picture(tmp_path):
    common.plot_curves(tmp_path / "c.png", "SYNTHETIC", {"a": ([0, 1], [0.2, 0.4])}, "x", "y")
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_mean_and_interval():
    mean, half = common.mean_ci95([0.0, 1.0] * 50)
    assert mean == 0.5 and half == pytest.approx(1.96 * 0.5 / 10)
    mean, half = common.mean_ci95([0.25])
    assert mean == 0.25 and math.isnan(half)


def test_the_interval_of_few_values_is_students():
    """Against the table in any textbook, to its digits."""
    assert [round(common.student_quantile(n), 3) for n in (1, 2, 4, 9, 28)] == [12.706, 4.303, 2.776, 2.262, 2.048]
    mean, half = common.mean_ci95(range(10))
    assert mean == 4.5 and half == pytest.approx(2.2622 * 3.02765 / 10**0.5, rel=1e-4)


# --- flags, signals, errors ---

def flags(*argv):
    parser = argparse.ArgumentParser()
    common.add_run_flags(parser)
    return parser.parse_args(argv)


@pytest.mark.parametrize("argv", [["--max-minutes", "0"], ["--max-minutes", "nan"], ["--threads", "1.5"],
                                  ["--threads", "-1"], ["--precision", "fp8"], ["--precision", "bf16"], ["--seed", "-1"], ["--seed", str(2**63)]])
def test_bad_values_of_flags_are_refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        flags(*argv)
    assert stopped.value.code == 2 and argv[1] in capsys.readouterr().err


def test_help_states_a_default_once():
    parser = argparse.ArgumentParser(formatter_class=common.HelpFormatter)
    parser.add_argument("--a", default=7, help="number")
    parser.add_argument("--b", default=8, help="number (default: eight)")
    parser.add_argument("--c", help="left open")
    parser.add_argument("--d", action="store_true", help="switch")
    text = " ".join(parser.format_help().split())
    assert "number (default: 7) --b B number (default: eight) --c C left open --d switch" in text


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "cpu:x", "xpu", "meta"])
def test_a_device_that_is_not_there_is_named(device):
    with pytest.raises(UsageError, match=device):
        common.setup(flags("--device", device))


def test_the_same_seed_gives_the_same_numbers():
    draws = [common.setup(flags("--seed", s, "--device", "cpu")) and torch.rand(2).tolist() for s in ("3", "3", "4")]
    assert draws[0] == draws[1] != draws[2]


def test_signals_and_time_ask_to_stop():
    before = signal.getsignal(signal.SIGTERM)
    with common.stop_signal() as stop:
        assert not stop.requested()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested() and stop.reason == "signal"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    assert signal.getsignal(signal.SIGTERM) is before
    with common.stop_signal(max_minutes=1, spent_seconds=61) as stop:
        assert stop.requested() and stop.reason == "time"


class Descent:
    """A learner with one weight, and its training on noisy gradients: 3 of 20 units an update, a line every 6 units."""

    def __init__(self):
        self.theta, self.generator = {"w": torch.ones(1)}, None

    def train(self, run, resume=False, signal_at=None, gradient=1.0, signal_at_end=False, spoiled_at=None):
        args = argparse.Namespace(units=20, max_minutes=None)
        run, checkpoint = common.open_run(run, {}, resume)
        optimiser, rng = torch.optim.Adam(self.theta.values(), 0.1), torch.Generator().manual_seed(0)
        now, counts = {"unit": 0, "seconds": 0.0, "pending": [], "stopped": None}, []
        kept = {"optimisers": [optimiser], "rng": rng}
        with common.Training(self, args, run, checkpoint, "unit", now, kept, per_update=3) as training:
            while count := training.goes_on():
                counts.append(count)
                self.theta["w"].grad = gradient + torch.rand(1, generator=rng)
                optimiser.step()
                if now["unit"] == signal_at:
                    signal.raise_signal(signal.SIGTERM)
                if now["unit"] == spoiled_at:
                    self.theta["other"][1] = float("inf")
                training.advance(torch.cat([self.theta["w"] * gradient, self.theta["w"]]))
                if training.due(6):
                    training.log("loss", "weight")
                if training.due(100, 9):
                    training.save()
            if signal_at_end:
                signal.raise_signal(signal.SIGTERM)
        return counts


def test_training_that_is_stopped_within_a_log_line_ends_as_one_that_is_not(tmp_path):
    one, two = Descent(), Descent()
    assert one.train(tmp_path / "whole") == [3] * 6 + [2]
    with pytest.raises(KeyboardInterrupt):
        two.train(tmp_path / "run", signal_at=6)
    checkpoint = torch.load(tmp_path / "run/checkpoint.pt", weights_only=True)
    assert checkpoint["now"]["unit"] == 9 and len(checkpoint["now"]["pending"]) == 1
    two = Descent()
    two.train(tmp_path / "run", resume=True)
    assert torch.equal(one.theta["w"], two.theta["w"])
    assert [line["unit"] for line in common.read_log(tmp_path / "run")] == [6, 12, 18, 20]
    assert common.read_log(tmp_path / "run") == common.read_log(tmp_path / "whole")


def test_a_signal_after_the_last_update_is_heard_too(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        Descent().train(tmp_path / "run", signal_at_end=True)
    assert Descent().train(tmp_path / "run", resume=True) == []


def test_random_numbers_of_another_kind_of_device_are_named():
    state = torch.zeros(16, dtype=torch.uint8)      # a CUDA generator's: seed and offset
    with pytest.raises(UsageError, match="another kind of device"):
        common._set_state([torch.Generator()], [state])


def test_training_ends_where_a_loss_is_not_finite_and_says_where(tmp_path):
    with pytest.raises(UsageError, match=r"meta-loss \(nan\) at unit 6; no checkpoint"):
        Descent().train(tmp_path, gradient=float("nan"))


def test_a_checkpoint_without_what_the_run_needs_is_named(tmp_path):
    args = argparse.Namespace(episodes=10, max_minutes=None)
    learner, now = argparse.Namespace(theta={}, generator=None), {"episode": 0, "seconds": 0.0}
    start = lambda checkpoint: common.Training(learner, args, tmp_path, checkpoint, "episode", now, {"rng": torch.Generator()})
    whole = {"weights": {"theta": {}}, "now": {}, "rng": torch.Generator().get_state()}
    start(whole)
    with pytest.raises(common.UsageError, match="lacks now, rng: another version"):
        start({"weights": whole["weights"]})


def test_output_that_nobody_reads_any_more_ends_the_program_quietly():
    program = "import common; common.run_main(lambda: print('x' * 10 ** 6))"
    writer = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    writer.stdout.close()
    assert (writer.stderr.read(), writer.wait()) == (b"", 1)


def test_another_broken_pipe_is_not_hidden():
    def main():
        raise BrokenPipeError("the encoder's")
    with pytest.raises(BrokenPipeError, match="encoder"):
        common.run_main(main)


def test_weights_that_are_not_finite_replace_no_checkpoint(tmp_path):
    """An update may spoil them after its loss: the next loss would tell too late."""
    learner = Descent()
    learner.theta["other"] = torch.zeros(2)
    with pytest.raises(UsageError, match=r"numbers in other \(nan\) at unit 18; the last good checkpoint is .*checkpoint.pt"):
        learner.train(tmp_path, spoiled_at=12)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert kept["now"]["unit"] == 9 and kept["weights"]["theta"]["other"].tolist() == [0, 0]


def test_user_errors_are_one_line_and_bugs_keep_their_traceback(capsys):
    def bad_input():
        raise UsageError("what was wrong")
    with pytest.raises(SystemExit) as stopped:
        common.run_main(bad_input)
    assert stopped.value.code == 2 and capsys.readouterr().err == "error: what was wrong\n"
    with pytest.raises(ZeroDivisionError):
        common.run_main(lambda: 1 / 0)


# --- downloads ---

BODY = bytes(range(256)) * 4000
SHA = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def server():
    """A mirror on this machine; its `log` lists (path, Range) of each request."""
    log = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            asked = self.headers.get("Range")
            log.append((self.path, asked))
            if self.path == "/missing":
                return self.send_error(404)
            if self.path == "/page":
                self.send_response(200)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.end_headers()
                return self.wfile.write(b"<html>quota exceeded</html>")
            if self.path == "/garbage":
                return self.wfile.write(b"this is no HTTP\r\n")
            if self.path == "/chunks":                     # that end in the middle
                self.send_response(200)
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                return self.wfile.write(b"10\r\nabc")
            start = int(asked[6:-1]) if asked and self.path != "/norange" else 0
            if start >= len(BODY):
                return self.send_error(416)
            body = BODY[start:] if self.path != "/corrupt" else b"x" * len(BODY)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            cut = len(body) // 2 if self.path == "/cut" and len(log) == 1 or self.path == "/broken" else len(body)
            self.wfile.write(body[:cut])

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    httpd.log = log
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    yield httpd
    httpd.shutdown()


def fetch(server, tmp_path, *paths, **known):
    return common.fetch_file([server.url + p for p in paths], tmp_path / "file.bin", **({"sha256": SHA} | known),
                             manual="get it by hand")


def test_a_file_is_fetched_verified_and_not_fetched_again(server, tmp_path):
    assert fetch(server, tmp_path, "/good").read_bytes() == BODY
    fetch(server, tmp_path, "/good")
    assert len(server.log) == 1 and not list(tmp_path.glob("*.part"))


def test_a_cut_connection_is_resumed_where_it_broke(server, tmp_path):
    assert fetch(server, tmp_path, "/cut").read_bytes() == BODY
    assert server.log == [("/cut", None), ("/cut", f"bytes={len(BODY) // 2}-")]


@pytest.mark.parametrize("path", ["/good", "/norange"])
def test_a_part_of_an_earlier_try_is_used_if_the_server_can(path, server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(BODY[:1000])
    assert fetch(server, tmp_path, path).read_bytes() == BODY
    assert server.log == [(path, "bytes=1000-")]


def test_a_part_that_is_already_whole_is_recognised(server, tmp_path):
    (tmp_path / "file.bin.part").write_bytes(BODY)
    assert fetch(server, tmp_path, "/good").read_bytes() == BODY


@pytest.mark.parametrize("bad", ["/missing", "/page", "/corrupt", "/garbage", "/chunks"])
def test_the_next_mirror_is_tried(bad, server, tmp_path):
    assert fetch(server, tmp_path, bad, "/good").read_bytes() == BODY


def test_all_mirrors_failing_lists_the_reasons_and_the_manual_way(server, tmp_path):
    with pytest.raises(DownloadError) as failed:
        fetch(server, tmp_path, "/missing", "/page", "/corrupt", "/broken")
    for text in ("404", "web page", "sha256 is", "the connection ended after", "get it by hand"):
        assert text in str(failed.value)
    assert not (tmp_path / "file.bin").exists()


def test_size_and_md5_are_checked(server, tmp_path):
    with pytest.raises(DownloadError, match="expected 7"):
        fetch(server, tmp_path, "/good", size=7)
    with pytest.raises(DownloadError, match="md5 is"):
        fetch(server, tmp_path, "/good", sha256=None, md5="0" * 32)


def test_a_disk_that_is_full_is_named_and_the_part_kept(server, tmp_path, monkeypatch):
    (tmp_path / "file.bin.part").write_bytes(BODY[:1000])

    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(common, "_download", no_space)
    with pytest.raises(UsageError, match="file.bin.part: the disk is full.* start the download again") as failed:
        fetch(server, tmp_path, "/good")
    assert not isinstance(failed.value, DownloadError) and (tmp_path / "file.bin.part").stat().st_size == 1000


# --- archives and caches ---

def make_zip(path, **members):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return path


def test_archives_are_unpacked_beside_what_is_there(tmp_path):
    target = tmp_path / "out"
    common.extract_archive(make_zip(tmp_path / "a.zip", a__b="1"), target)
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        info = tarfile.TarInfo("c/d")
        info.size = 1
        archive.addfile(info, io.BytesIO(b"2"))
    common.extract_archive(tmp_path / "c.tar.gz", target)
    assert (target / "a" / "b").read_text() + (target / "c" / "d").read_text() == "12"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "c.tar.gz", "out"]
    with pytest.raises(DataError, match="already there"):
        common.extract_archive(tmp_path / "a.zip", target)


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_an_archive_that_the_disk_cannot_take_is_not_called_damaged(tmp_path, monkeypatch, kind):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a").write_bytes(b"1")
    archive = shutil.make_archive(tmp_path / "archive", kind, tmp_path / "in")

    def no_space(*args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(shutil, "copyfileobj", no_space)
    monkeypatch.setattr(tarfile, "copyfileobj", no_space)
    with pytest.raises(UsageError, match="the disk is full") as failed:
        common.extract_archive(archive, tmp_path / "out")
    assert not isinstance(failed.value, DataError) and sorted(p.name for p in tmp_path.iterdir()) == ["archive" + Path(archive).name[7:], "in"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "..\\evil"])
def test_a_zip_that_would_leave_its_folder_is_refused(name, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(zipfile.ZipInfo(name), "x")
    with pytest.raises(DataError, match="evil"):
        common.extract_archive(tmp_path / "bad.zip", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "evil").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind, tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        info = tarfile.TarInfo("link")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match="link"):
        common.extract_archive(tmp_path / "bad.tar", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_link_in_a_zip_is_refused(tmp_path):
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(DataError, match="link"):
        common.extract_archive(tmp_path / "bad.zip", tmp_path / "out")


@pytest.mark.parametrize("name", ["cut.zip", "cut.tar.gz"])
def test_a_cut_archive_is_named_and_leaves_nothing(name, tmp_path):
    whole = tmp_path / ("whole" + name[3:])
    payload = os.urandom(50_000)
    if name.endswith("zip"):
        make_zip(whole, a=payload)
    else:
        with tarfile.open(whole, "w:gz") as archive:
            info = tarfile.TarInfo("a")
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    (tmp_path / name).write_bytes(whole.read_bytes()[:30_000])
    with pytest.raises(DataError, match=name):
        common.extract_archive(tmp_path / name, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.tmp"))


def test_an_array_is_built_once_per_fingerprint_and_rebuilt_if_damaged(tmp_path):
    built = []

    def build():
        built.append(1)
        return np.arange(6)
    for fingerprint in ("a", "a", "b"):
        array = common.cached_array(tmp_path, "x", fingerprint, build)
        assert array.tolist() == list(range(6)) and not array.flags.writeable
    assert len(built) == 2
    for path in tmp_path.glob("*.npy"):
        path.write_bytes(path.read_bytes()[:-8])
    assert common.cached_array(tmp_path, "x", "a", build).tolist() == list(range(6))
    assert len(built) == 3


def test_without_a_writable_cache_the_array_stays_in_memory(tmp_path, capsys):
    (tmp_path / "file").write_text("not a folder")
    assert common.cached_array(tmp_path / "file", "x", "a", lambda: np.ones(2)).tolist() == [1, 1]
    assert "no cache" in capsys.readouterr().err


def test_a_fingerprint_follows_name_size_and_time(tmp_path):
    path = tmp_path / "a"
    path.write_text("1")
    marks = [common.fingerprint_files([path])]
    os.utime(path, (1, 1))
    marks.append(common.fingerprint_files([path]))
    path.write_text("12")
    os.utime(path, (1, 1))
    marks.append(common.fingerprint_files([path]))
    assert len(set(marks)) == 3


def test_many_tensors_are_copied_at_once():
    """Of several dtypes, from views too; a tensor too few is an error."""
    sources = [torch.randn(3, 4).expand(2, 3, 4), torch.arange(5), torch.randn(4, 2).T, torch.randn(2, 2).bfloat16()]
    targets = [torch.empty(t.shape, dtype=t.dtype) for t in sources]
    common.copy_all(sources, targets)
    assert all(torch.equal(*pair) for pair in zip(sources, targets))
    with pytest.raises(ValueError):
        common.copy_all(sources[1:], targets)


def test_an_optimisers_state_goes_on_in_another_implementation():
    """A GPU's one-kernel Adam saves what the CPU's reads, and the other way round."""
    def steps(fused, state, count):
        p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        optimiser = torch.optim.Adam([p], lr=0.1, fused=fused)
        if state:
            common._set_state(optimiser, state[0])
            with torch.no_grad():
                p.copy_(state[1])
        for _ in range(count):
            optimiser.zero_grad()
            p.pow(2).sum().backward()
            optimiser.step()
        assert optimiser.param_groups[0]["fused"] == fused
        return optimiser.state_dict(), p.detach()

    expected = steps(False, None, 5)[1]
    for first, then in ((True, False), (False, True)):
        torch.testing.assert_close(steps(then, steps(first, None, 3), 2)[1], expected)
