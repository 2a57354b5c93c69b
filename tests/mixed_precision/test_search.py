"""The search: exact on its table, within its limit on the program, and each cost a measured one."""

import json

import pytest
import torch
from brute_force import brute_force
from PIL import Image
from torch import nn

import quantflow as qf
from quantflow.mixed_precision.solve import solve
from quantizers import DYNAMIC_W4, INT8, XNNPACKQuantizer

pytestmark = pytest.mark.slow


class Mixed(nn.Module):
    """A convolution, which has no 4-bit kernel, and linear layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.first, self.second, self.head = nn.Linear(256, 128), nn.Linear(128, 64), nn.Linear(64, 8)

    def forward(self, x):
        x = torch.relu(self.conv(x)).flatten(1)
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


@pytest.fixture(scope="module")
def found():
    torch.manual_seed(0)
    model, x = Mixed().eval(), torch.randn(64, 2, 8, 8)
    whole = qf.quantize(model, (x[:1],), x.split(16), recover=False, progress=False)
    limit = len(whole.program.buffer) - 8000
    return model, x, limit, qf.search(model, (x[:1],), x.split(16), max_bytes=limit, recover=False, progress=False)


def test_the_program_keeps_the_limit_and_is_as_large_as_predicted(found):
    model, x, limit, search = found
    size = len(search.result.program.buffer)
    assert size <= limit
    assert search.table.total(search.chosen)[1] == pytest.approx(size, rel=0.02)
    precisions = {c.layer: c.precision for c in search.chosen}
    assert "4-bit weights" in precisions.values()
    assert precisions["conv"] != "4-bit weights"
    assert not any(c.layer == "conv" and c.precision == "4-bit weights" for c in search.table.choices)
    with torch.no_grad():
        assert torch.isfinite(search.result.program(x[:1]) - model(x[:1])).all()


def test_the_choice_is_within_one_percent_of_brute_force(found):
    _, _, limit, search = found
    assert search.table.total(search.chosen)[0] <= brute_force(search.table, limit, None) * 1.01


def test_costs_are_measured_ones(found):
    _, _, _, search = found
    cost = {(c.layer, c.precision): c for c in search.table.choices}
    assert cost["first", "int8"].size == 0
    assert cost["first", "float"].size == pytest.approx(256 * 128 * 3, rel=0.1)
    assert cost["first", "4-bit weights"].size == pytest.approx(-256 * 128 / 2, rel=0.3)
    assert cost["first", "float"].noise == 0 < cost["first", "int8"].noise < cost["first", "4-bit weights"].noise


class Counted:
    """Batches, and how many of them were asked for."""

    def __init__(self, batches):
        self.batches, self.asked = batches, 0

    def __iter__(self):
        for batch in self.batches:
            self.asked += 1
            yield batch


def test_data_are_gone_through_once_a_precision(found):
    """And once for the program that is built: sizes and latencies need no statistics."""
    model, x, limit, search = found
    data = Counted(x.split(16))
    again = qf.search(model, (x[:1],), data, max_bytes=limit, recover=False, progress=False)
    precisions = {c.precision for c in search.table.choices}
    assert data.asked <= 4 * (len(precisions - {"float"}) + 1) + 1
    assert len(search.table.choices) > 9
    assert again.chosen == search.chosen


def test_it_prints_draws_and_writes_json(found, tmp_path):
    _, _, _, search = found
    assert "first" in str(search)
    assert set(json.loads(search.to_json())["precisions"]) == {"conv", "first", "second", "head"}
    with Image.open(search.plot(tmp_path / "pareto.png")) as image:
        assert len(image.convert("L").getcolors(256)) > 2


def test_latency_is_a_limit_too():
    model, x = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval(), torch.randn(8, 32)
    integers = {"int8": INT8, "4-bit weights": DYNAMIC_W4}
    given = {"max_ms": 1000.0, "recover": False, "progress": False}
    found = qf.search(model, (x[:1],), [x], precisions=integers, **given)
    assert {c.precision for c in found.chosen} == {"int8"}
    assert found.table.time > 0
    assert found.ms is not None
    assert 0 < found.ms < 1000
    with pytest.raises(qf.QuantflowError, match="the least are"):
        solve(found.table, max_ms=-1.0)
    with pytest.raises(qf.QuantflowError, match="float program keeps the limit"):
        qf.search(model, (x[:1],), [x], precisions={"float": None}, **given)


def test_bad_input_is_named():
    model, x = nn.Linear(4, 2).eval(), torch.randn(8, 4)
    with pytest.raises(qf.QuantflowError, match="no limit"):
        qf.search(model, (x,), [x])
    with pytest.raises(qf.QuantflowError, match="once only"):
        qf.search(model, (x,), iter([x]), max_bytes=1)
    with pytest.raises(qf.QuantflowError, match="no layer with weights"):
        qf.search(model, (x,), [x], max_bytes=1, quantizer=XNNPACKQuantizer(skip=lambda node: True))


def test_one_layer_is_searched():
    model, x = nn.Linear(64, 64).eval(), torch.randn(8, 64)
    given = {"precisions": {"float": None, "int8": INT8}, "recover": False, "progress": False}
    found = qf.search(model, (x[:1],), [x], max_bytes=12_000, **given)
    assert [c.precision for c in found.chosen] == ["int8"]
    assert len(found.result.program.buffer) <= 12_000
    assert solve(found.table, max_bytes=100_000)[0].precision == "float"
    with pytest.raises(qf.QuantflowError, match="the float program keeps the limit"):
        qf.search(model, (x[:1],), [x], max_bytes=100_000, **given)


def test_precisions_that_fit_no_layer():
    model, x = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU()).eval(), torch.randn(8, 2, 8, 8)
    given = {"max_bytes": 100_000, "recover": False, "progress": False}
    with pytest.warns(qf.QuantflowWarning, match="4-bit: no layer can have it"):
        found = qf.search(model, (x[:1],), [x], precisions={"int8": INT8, "4-bit": DYNAMIC_W4}, **given)
    assert [(c.layer, c.precision) for c in found.chosen] == [("0", "int8")]
    with pytest.raises(qf.QuantflowError, match=r"0: it can have none of the precisions: no 4-bit, convolution has no"):
        qf.search(model, (x[:1],), [x], precisions={"4-bit": DYNAMIC_W4}, **given)
    for precisions, words in (
        ({}, "no precisions"),
        (["int8"], "no precisions"),
        ({"a": "int8"}, "'int8' is no Scheme"),
    ):
        with pytest.raises(qf.QuantflowError, match=words):
            qf.search(model, (x[:1],), [x], precisions=precisions, **given)
    relu = nn.Sequential(nn.ReLU()).eval()
    with pytest.raises(qf.QuantflowError, match="no layer with weights"):
        qf.search(relu, (x[:1],), [x], **given)
