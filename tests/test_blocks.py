"""Batch norm, max-pool, ReLU: the forms agree, a wrong one stops the run, the command writes what it printed."""

import json
import shutil

import pytest
import torch

from kernels import blocks

CPU = torch.device("cpu")


def test_the_forms_and_their_derivatives_agree():
    data = blocks.make_data(3, 4, 9, CPU)                          # an odd side: the pool drops a row and a column
    blocks.check_agreement({"closed": blocks.eager_passes(blocks.closed_block, *data)}, data)


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_the_compiled_form_agrees():
    data = blocks.make_data(2, 2, 4, CPU)
    blocks.check_agreement({"compile": blocks.compiled_passes(blocks.pytorch_block, *data)}, data)


@pytest.mark.parametrize("where, block", [
    ("forward", lambda x, gamma, beta: 1.1 * blocks.closed_block(x, gamma, beta)),
    ("first derivatives", lambda x, gamma, beta: blocks.closed_block(x, gamma.detach() + 0 * gamma, beta)),
])
def test_a_wrong_form_stops_the_run(where, block):
    data = blocks.make_data(3, 4, 8, CPU)
    with pytest.raises(RuntimeError, match=f"wrong, {where}: off by"):
        blocks.check_agreement({"wrong": blocks.eager_passes(block, *data)}, data)


def test_command_writes_every_figure(tmp_path, capsys):
    path = tmp_path / "blocks.json"
    blocks.main(["--device", "cpu", "--layers", "conv3", "conv4", "--images", "1", "--channels", "2", "--seconds", "0.01",
                 "--json", str(path)])
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert {(row["layer"], row["pass"], row["form"]) for row in written["rows"]} == {
        (layer, name, form) for layer in ("conv3", "conv4") for name in blocks.PASSES for form in ("pytorch", "closed")}
    for row in written["rows"]:
        assert row["form"] in printed and row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]


def test_command_refuses_numbers_below_one(capsys):
    with pytest.raises(SystemExit):
        blocks.main(["--images", "0"])
    assert "--images, --channels and --threads must be at least 1" in capsys.readouterr().err
