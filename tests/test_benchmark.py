"""The benchmark of whole meta-steps: contenders agree, a broken one stops it, it counts right, the tables can be made."""

import contextlib
import io
import json
import sys

import pytest
import torch

import benchmark
import runs
from kernels import linears, products
from results import table

TINY = ["--image-size", "16", "--channels", "4", "--meta-batch", "2", "--repeats", "1", "--device", "cpu"]


def setting(method="modgrad", *more, dtype=torch.float32, tasks=2):
    return benchmark.Setting(benchmark.training_flags(benchmark.parse_flags(TINY), "--method", method, *more), tasks, dtype)


@pytest.mark.parametrize("case", [("modgrad",), ("maml", "--inner-steps", "2")])
def test_all_contenders_compute_one_meta_gradient(case):
    full, small = setting(*case), setting(*case, dtype=torch.float64, tasks=1)
    names, absent = benchmark.contenders(case[0], full.device)
    assert {"ours", "naive"} <= set(names) and not set(names) & set(absent)
    errors = benchmark.check_agreement(full, small, names)
    assert errors["ours"] < 1e-3 and errors["naive"] == 0           # so small a network flips no ReLU: rounding only
    if "ours_bf16" in names:
        assert errors["ours_bf16"] > 1e-3                           # bfloat16 was in use


def test_a_broken_contender_stops_the_run():
    full, small = setting(), setting(dtype=torch.float64, tasks=1)
    wrong = full.args.inner_lr * (1 + 1e-6)
    full.naive_bf16 = full.naive
    full.ours_bf16 = lambda: (full.naive(), [p.grad.mul_(1.2) for p in full.learner.parameters()])
    with pytest.raises(RuntimeError, match="ours_bf16 disagrees"):
        benchmark.check_agreement(full, small, ["ours", "naive_bf16", "ours_bf16"])
    small.ours = lambda: benchmark.Setting.ours(small, inner_lr=wrong)
    with pytest.raises(RuntimeError, match="ours disagrees: in float64"):
        benchmark.check_agreement(full, small, ["ours"])


def test_the_module_of_the_peers_is_the_same_network():
    case = setting("maml")
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(case.module()(x), benchmark.naive.conv4_logits(case.learner.theta, x))
    assert dict(case.module().named_parameters()).keys() == case.learner.theta.keys()


def test_operations_by_hand():
    """One convolution through kernels/layers.py, forward, backward and double backward: 1, 1 and 2 products of its size."""
    from kernels import conv2d
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3, requires_grad=True)
    product = 2 * 2 * 4 * 8 * 8 * 3 * 9
    with benchmark.FlopCounter() as counter:
        y = conv2d(x, w, torch.zeros(4))
        assert counter.flops == product
        first = torch.autograd.grad(y.square().sum(), w, create_graph=True)[0]
        assert counter.flops == 2 * product
        torch.autograd.grad(first.square().sum(), w)     # to G, then through y to w
    assert counter.flops == 4 * product


@pytest.mark.skipif(not products.has_onednn(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("rows", [10, products.LONG])
def test_operations_of_a_linear_layer_by_onednn(rows):
    x, weight = torch.randn(rows, 7, requires_grad=True), torch.randn(5, 7, requires_grad=True)
    with linears.everywhere(), benchmark.FlopCounter() as counter:
        torch.autograd.grad(products.linear(x, weight).square().sum(), [x, weight])
    assert counter.flops == 3 * 2 * rows * 7 * 5


@pytest.mark.skipif(not products.has_onednn(), reason="this PyTorch has no oneDNN")
def test_operations_of_a_product_of_groups_by_onednn():
    with benchmark.FlopCounter() as counter:
        products.grouped_product(torch.randn(4, 16, 32), rows=9)(torch.randn(9, 4, 16))
    assert counter.flops == 2 * 9 * 4 * 16 * 32


def test_where_many_devices_saturate():
    case = {"trainable_numbers": 10**6, "meta_batch": 2,
            "contenders": {"ours": {"seconds_per_episode": {"median": 0.5}}, "naive": {"seconds_per_episode": {"median": 9.0}}}}
    text = benchmark.data_parallel(case)
    # 10 Gbit/s: 2 * 0.99 * 4e6 / 1.25e9 + 2 * 99 * 30e-6 s beside a step of 1 s
    assert "4.0 MB all-reduced" in text and f"{1 / (1 + 0.006336 + 0.00594):.1%} of ideal" in text


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The whole command, in this process but for its workers: (the file that it wrote, what it printed)."""
    path, printed, threads = tmp_path_factory.mktemp("speed") / "speed-test.json", io.StringIO(), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        flags = [*TINY, "--methods", "maml", "--maml-steps", "1", "--memory", "--json", str(path)]
        patch.setattr(sys, "argv", ["benchmark.py", *flags])
        benchmark.main()
    torch.set_num_threads(threads)
    return path, printed.getvalue()


def test_command_writes_every_figure(written):
    figures, printed = json.loads(written[0].read_text()), written[1]
    assert {"command", "device_name", "threads", "versions", "commit", "matmul_gflops"} <= figures.keys()
    case, = figures["cases"]
    assert {"ours", "naive", "naive_stock"} <= case["contenders"].keys()
    for name, c in case["contenders"].items():
        q = c["seconds_per_episode"]
        assert 0 < q["p20"] <= q["median"] <= q["p80"] and name in printed
        ratio = case["contenders"]["ours"]["seconds_per_episode"]["median"] / q["median"]
        assert c["ours_over_this_seconds"]["median"] == pytest.approx(ratio)      # one repeat: the ratio of the medians
    assert all(f"{name:12} not timed" in printed for name in case["absent"])
    assert 0 < case["gflop_per_episode"]["ours"]


def test_a_worker_answers_with_time_and_memory_and_its_death_is_an_error():
    with benchmark.Worker("ours", benchmark.training_flags(benchmark.parse_flags(TINY)), 1) as worker:
        answer = worker.step()
        assert 0 < answer["seconds"] and 2**26 < answer["peak_memory_bytes"] < 2**34
        worker.process.kill()
        with pytest.raises(RuntimeError, match="a worker ended with status -9"):
            worker.step()


def test_scaling_changes_one_thing_at_a_time(monkeypatch):
    seen = []

    class InProcess(contextlib.nullcontext):
        """Stands in for Worker: checks that the flags can be used and answers at once."""
        def __init__(self, contender, flags, tasks):
            super().__init__(self)
            learner = benchmark.Setting(flags, tasks).learner
            numbers = sum(p.numel() for p in learner.generator.parameters())
            seen.append((tasks, len(learner.adapted), numbers))

        def step(self):
            return {"seconds": 2.0, "cpu_seconds": 1.0, "peak_memory_bytes": 3}

    monkeypatch.setattr(benchmark, "Worker", InProcess)
    results = benchmark.measure_scaling(benchmark.parse_flags(TINY), torch.device("cpu"))
    assert results["tasks"]["4"]["seconds_per_episode"]["median"] == 0.5 and results["tasks"]["4"]["peak_memory_bytes"] == 3
    assert [row[0] for row in seen[:4]] == [1, 2, 4, 8] and {row[0] for row in seen[4:]} == {1}
    layers = list(results).index("modulated convolutions (the last n)")
    assert layers == 3 and [row[1] for row in seen[11:15]] == [2, 4, 6, 8]
    assert seen[15][2] < seen[16][2] < seen[17][2]           # rank 1, 5, 10


def test_tables_are_made_with_and_without_optional_parts(written, monkeypatch):
    monkeypatch.setattr(table, "HERE", written[0].parent)
    full = json.loads(written[0].read_text())
    ours = full["cases"][0]["contenders"]["ours"]
    full["peak_memory_bytes"] = {"1": {"whole": 2**30, "task_chunk_1": 2**30}}
    full["scaling"] = {"tasks": {"1": {"seconds_per_episode": ours["seconds_per_episode"], "peak_memory_bytes": 2**30}}}
    bare = json.loads(written[0].read_text()) | {"peak_memory_bytes": {}, "device_name": "bare"}
    contenders = bare["cases"][0]["contenders"]
    bare["cases"][0]["contenders"] = {name: {key: value for key, value in contenders[name].items() if "bf16" not in key}
                                      for name in ("ours", "naive")}
    for figures in (full, bare):
        (written[0].parent / f"speed-{figures['device_name'].replace(' ', '')}.json").write_text(json.dumps(figures))
    speed, scaling = table.speed().splitlines(), table.scaling().splitlines()
    name = f"| bare ({bare['cpu_capability']}), "
    assert sum(name in row for row in speed) == 2 and not any("| bare" in row for row in scaling)
    assert "| tasks | 1: " in scaling[2] and "1: 1.00 |" in scaling[2]
    assert len({row.count("|") for row in speed}) == len({row.count("|") for row in scaling}) == 1


def test_too_small_an_image_is_refused_in_one_line():
    done = runs.script("benchmark.py", "--image-size", 8)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: Conv-4 halves the image four times")
