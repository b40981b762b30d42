"""The kernel benchmark: it counts bytes right, refuses wrong results, and writes what it printed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import benchmark

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")


def test_model_bytes_by_hand():
    # 2 x 3 matrix, 4 tasks, 2-byte numbers: T n1 n2 = 24, theta 6, a and b together T (n1 + n2) = 20.
    counts = benchmark.model_bytes([(2, 3)], 4, 2)
    assert counts["forward"] == 2 * (24 + 6 + 20 + 24)
    assert counts["backward"] == 2 * (24 + 24 + 20 + 24 + 6 + 20)
    assert counts["double backward"] == 2 * (3 * 24 + 20 + 20 + 24 + 24 + 20)
    assert counts["inner step"] == (2 * counts["forward"] + 2 * counts["backward"] + 2 * (2 * 24 + 2 * 20)
                                    + counts["double backward"] - 2 * 24 + 2 * 4 * 24)      # the last: the network between


def test_sizes_hold_as_many_weights_as_the_layers_of_the_paper():
    weights = {name: sum(n1 * n2 for n1, n2 in shapes) for name, shapes in benchmark.SIZES.items()}
    assert weights["conv4"] == weights["conv4-natural"] == 2 * (64 * 64 * 9 + 64)
    assert weights["resnet34"] == 2 * 512 * 512 * 9 and weights["wrn"] == 2 * 640 * 640 * 9
    assert weights["wrn-natural"] == 640 * 640 * 9


def test_compiled_and_autograd_passes_compute_the_same():
    case = benchmark.make_case([(3, 4), (1, 5)], 2, torch.float32, CPU)
    plain = benchmark.autograd_passes(benchmark.eager_step, case)
    with torch.compiler.set_stance("force_eager"):       # the functions are checked, not the compiler
        functional = benchmark.compiled_passes(benchmark.eager_step, case)
        results = {name: benchmark.flat(function()) for name, function in functional.items()}
    for name in benchmark.PASSES:
        ours, true = results[name], benchmark.flat(plain[name]())
        assert len(ours) == len(true)
        for one, other in zip(ours, true):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)     # float32 sums of a few terms


def test_a_wrong_contender_stops_the_run():
    def wrong(theta, grad, row, col):
        return benchmark.eager_step(theta, grad, row, [1.001 * b for b in col])

    case = benchmark.make_case([(3, 4)], 2, torch.float32, CPU)
    good = {"addcmul": benchmark.autograd_passes(benchmark.addcmul_step, case)}
    assert max(benchmark.check_agreement(good, case, "here").values()) <= 1
    with pytest.raises(SystemExit, match="wrong, forward, here"):
        benchmark.check_agreement({"wrong": benchmark.autograd_passes(wrong, case)}, case, "here")


def test_a_device_that_is_none_is_named():
    with pytest.raises(SystemExit, match="--device 'gpu' is no device: use cpu, cuda or cuda:N"):
        benchmark.select_device("gpu")


def test_quick_leaves_what_is_given():
    given = benchmark.parse_flags(["--quick", "--tasks", "3", "--seconds", "0.2"])
    assert (given.sizes, given.tasks, given.seconds) == (["conv4"], [3], 0.2)
    assert benchmark.parse_flags(["--quick"]).tasks == [4]


def test_command_writes_every_figure_and_says_what_was_not_timed(tmp_path):
    path = tmp_path / "new" / "kernels.json"
    command = [sys.executable, "-m", "kernels.benchmark", "--quick", "--device", "cpu", "--seconds", "0.01",
               "--threads", "1", "--contenders", "eager,addcmul,triton", "--json", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "not timed: triton: Triton needs a CUDA device" in run.stdout
    written = json.loads(path.read_text())
    assert "kernels.benchmark --quick" in written["command"] and written["torch"] == torch.__version__ and written["threads"] == 1
    assert {(row["pass"], row["contender"]) for row in written["rows"]} == {
        (name, contender) for name in benchmark.PASSES for contender in ("eager", "addcmul")}
    for row in written["rows"]:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert abs(row["gb_per_s"] * row["median_ms"] * 1e6 - row["model_bytes"]) < 1e-6 * row["model_bytes"]
