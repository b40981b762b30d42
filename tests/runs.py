"""How the tests start the training scripts, stop them in the middle, and read the run folders that they leave."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import common

ROOT = Path(__file__).resolve().parent.parent
ON_CPU = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}      # where runs repeat bit for bit; tests/test_cuda.py is for GPUs


class CudaGraphImitation:
    """What common.CudaGraph is to its users, on a CPU: its inputs and gradients stay in place."""

    def __init__(self, function, inputs, parameters):
        self.function, self.inputs, self.parameters = function, [t.clone() for t in inputs], list(parameters)
        function(*self.inputs)
        self.gradients = [p.grad for p in self.parameters]

    def __call__(self, *inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        output = self.function(*self.inputs)
        for p, own in zip(self.parameters, self.gradients):
            own.copy_(p.grad)
            p.grad = own
        return tuple(t.clone() for t in output) if isinstance(output, tuple) else output.clone()


def imitate_cuda_graphs(monkeypatch):
    """Put the imitation in place; returns a list that grows by the length of the first input with each one that is made."""
    made = []

    def imitation(function, inputs, parameters):
        made.append(len(inputs[0]))
        return CudaGraphImitation(function, inputs, parameters)

    monkeypatch.setattr(common, "CudaGraph", imitation)
    return made


def script(name, *flags, cwd=ROOT):
    """A script as its users start it, on a CPU, to its end."""
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], cwd=cwd, capture_output=True, text=True,
                          timeout=300, env=ON_CPU)


def refusal(main, *flags):
    """The last line of what a script's `main`, called in this process, says as it refuses its flags."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises((common.UsageError, SystemExit)) as stopped:
        main([str(flag) for flag in flags])
    if isinstance(stopped.value, SystemExit):                     # argparse's own, which says it on stderr
        assert stopped.value.code == 2
        return said.getvalue().splitlines()[-1]
    return str(stopped.value).splitlines()[-1]


def complete(name, *flags, home):
    """An uninterrupted run in the folder `home`, which holds no data: (its folder, what it printed)."""
    done = script(name, *flags, "--out", home / "run", cwd=home)
    assert done.returncode == 0, done.stderr
    return home / "run", done.stdout


def interrupt(number, name, *flags, out, log_lines=0):
    """Start a run in `out` and send it signal `number` as soon as it has a checkpoint and so many lines of log."""
    process = subprocess.Popen([sys.executable, str(ROOT / name), *map(str, flags), "--out", str(out)], cwd=out.parent,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ON_CPU)
    deadline = time.monotonic() + 120
    while not ((out / "checkpoint.pt").exists() and (out / "log.jsonl").read_text().count("\n") >= log_lines):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    said = process.communicate(timeout=120)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130), said
    assert not (out / "result.json").exists()


def result(run):
    return json.loads((Path(run) / "result.json").read_text())


def weights(run):
    state = torch.load(Path(run) / "checkpoint.pt", weights_only=True)["weights"]
    return {**state["theta"], **(state["generator"] or {})}


def logged(run, unit, key):
    """Where, in `unit`, the log has a line with `key`."""
    return [line[unit] for line in common.read_log(run) if key in line]


def assert_whole_and_synthetic(run, printed):
    """All files are there, and what was printed and written says that the data are synthetic."""
    assert printed.splitlines()[0].startswith("SYNTHETIC")
    assert {p.name for p in run.iterdir()} >= {"config.json", "log.jsonl", "checkpoint.pt", "result.json", "curves.png"}
    assert result(run)["synthetic"] is True and result(run)["dataset"] == "synthetic"
