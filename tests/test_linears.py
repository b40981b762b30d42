"""A linear layer's products: the forms agree, a wrong one stops the run, the command writes what it printed."""

import json

import pytest

from kernels import linears, products

pytestmark = pytest.mark.skipif(not products.has_onednn(), reason="this PyTorch has no oneDNN")
SMALL = {"shared": linears.Layer(3, 11, 7, True), "own": linears.Layer(3, 11, 7, False)}


@pytest.mark.parametrize("where, layer", [
    ("forward", lambda x, weight, bias: 1.001 * linears.pytorch(x, weight, bias)),
    ("first derivatives", lambda x, weight, bias: linears.pytorch(x, weight.detach() + 0 * weight, bias)),
])
def test_a_wrong_form_stops_the_run(where, layer):
    data = linears.make_data(SMALL["own"])
    with pytest.raises(RuntimeError, match=f"wrong, {where}: off by"):
        linears.check_agreement({"wrong": linears.passes(layer, *data)}, data)


def test_command_times_all_forms_and_writes_every_figure(tmp_path, capsys, monkeypatch):
    taken, by_onednn = [], products._by_onednn
    monkeypatch.setattr(products, "_by_onednn", lambda *tensors: taken.append(0) or by_onednn(*tensors))
    monkeypatch.setattr(linears, "LAYERS", SMALL)
    path = tmp_path / "linears.json"
    linears.main(["--layers", "shared", "own", "--seconds", "0.01", "--json", str(path)])
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert {(row["layer"], row["pass"], row["form"]) for row in written["rows"]} == {
        (layer, name, form) for layer in SMALL for name in linears.PASSES for form in ("pytorch", "onednn", "ours")}
    for row in written["rows"]:
        assert row["form"] in printed and row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert len(taken) > 30                               # of products this small, only where they are taken everywhere


def test_command_refuses_what_it_cannot_do(capsys, monkeypatch):
    with pytest.raises(SystemExit):
        linears.main(["--threads", "0"])
    assert "--threads must be at least 1" in capsys.readouterr().err
    monkeypatch.setattr(products, "has_onednn", lambda: False)
    with pytest.raises(SystemExit):
        linears.main([])
    assert "this PyTorch has no oneDNN" in capsys.readouterr().err
