"""Per-task convolutions: all forms agree, a wrong one stops the run, the command writes what it printed."""

import json

import pytest
import torch

from kernels import convolutions

CPU = torch.device("cpu")


def test_all_forms_and_both_derivatives_agree():
    convolutions.check_agreement(convolutions.forms(2), convolutions.make_data((3, 4, 5), 2, 3, CPU))


@pytest.mark.parametrize("scale, where", [(1.01, "forward"), (1.0, "first derivatives")])
def test_a_wrong_form_stops_the_run(scale, where):
    contenders = convolutions.forms(2)
    loop = contenders["loop"]
    # The second one is right in its values and has lost the derivative with respect to the weights.
    weights = lambda w: scale * w if scale != 1 else w.detach() + 0 * w
    wrong = loop._replace(apply=lambda xs, w: loop.apply(xs, weights(w)))
    with pytest.raises(RuntimeError, match=f"wrong, {where}: off by"):
        convolutions.check_agreement({"loop": loop, "wrong": wrong}, convolutions.make_data((3, 4, 5), 2, 3, CPU))


def test_command_writes_every_figure(tmp_path, capsys):
    path = tmp_path / "convolutions.json"
    convolutions.main(["--device", "cpu", "--layers", "conv4", "--tasks", "1", "--images", "1", "--channels", "8", "--seconds", "0.01",
                       "--json", str(path)])
    written = json.loads(path.read_text())
    assert {(row["layer"], row["pass"], row["form"]) for row in written["rows"]} == {
        ("conv4", name, form) for name in convolutions.PASSES for form in convolutions.forms(1)}
    printed = capsys.readouterr().out
    for row in written["rows"]:
        assert row["form"] in printed and row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        flops = convolutions.PASSES[row["pass"]] * 2 * 8 * 8 * 9 * 10**2
        assert row["gflops"] * row["median_ms"] * 1e6 == pytest.approx(flops)


def test_command_refuses_numbers_below_one(capsys):
    with pytest.raises(SystemExit):
        convolutions.main(["--tasks", "0"])
    assert "--tasks, --images, --channels and --threads must be at least 1" in capsys.readouterr().err
