"""Diagnosis: planted faults come first, errors are each layer's own, and figures do not depend on batching."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from networks import ConvNet, WritesAPart, randomize_statistics, sqnr
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import fault_ranking
import peers

import quantflow as qf
from quantizers import DYNAMIC_INT8, DYNAMIC_W4, XNNPACKQuantizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def convnet():
    torch.manual_seed(0)
    model, x = randomize_statistics(ConvNet()).eval(), torch.randn(12, 3, 16, 16)
    graph = qf.export(model, (x[:1],), dynamic_batch=True).module()
    return model, graph, qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False), x


def diagnosed(graph, quantized, data):
    return qf.diagnose(graph, quantized, data, progress=False)


def by_node(diagnosis):
    return {found.node: found for found in diagnosis.layers}


def test_planted_faults_rank_first():
    rows = fault_ranking.measure(20, progress=False)
    for fault in fault_ranking.FAULTS:
        ranks = [row["rank"] for row in rows if row["fault"] == fault]
        assert len(ranks) == 20
        assert sum(rank == 1 for rank in ranks) >= 19, fault
        assert max(ranks) <= 3, fault


def test_a_right_network_has_no_layer_far_above_what_its_grid_must_cost():
    planted = fault_ranking.subject(0)
    found = diagnosed(planted.graph, planted.prepared, [torch.cat(planted.data)])
    assert all(layer.excess < 3 for layer in found.layers)
    assert len(found.layers) > 15


def test_prepared_converted_and_exported_again_are_one_network(convnet):
    _, graph, prepared, x = convnet
    first = diagnosed(graph, prepared, [x])
    for other in (qf.convert(prepared), qf.export(qf.convert(prepared), (x,)).module()):
        second = diagnosed(graph, other, [x])
        assert [layer.local for layer in first.layers] == pytest.approx([layer.local for layer in second.layers])
        assert [layer.layer for layer in first.layers] == [layer.layer for layer in second.layers]


def test_the_accumulated_error_at_the_end_is_that_of_the_network(convnet):
    model, graph, prepared, x = convnet
    converted = qf.convert(prepared)
    last = by_node(diagnosed(graph, converted, [x]))["linear"]
    with torch.no_grad():
        assert last.accumulated == pytest.approx(sqnr(model(x), converted(x)), abs=1e-3)


def test_sums_do_not_depend_on_batching(convnet):
    _, graph, prepared, x = convnet
    whole, parts = by_node(diagnosed(graph, prepared, [x])), by_node(diagnosed(graph, prepared, x.split(3)))
    for name, found in whole.items():
        other = parts[name]
        assert (found.local, found.accumulated) == pytest.approx((other.local, other.accumulated), rel=1e-5)
        assert (found.saturated, found.range_use) == pytest.approx((other.saturated, other.range_use))
        assert found.histogram == other.histogram
        assert found.channels == pytest.approx(other.channels, rel=1e-5)


def test_errors_are_local(convnet):
    _, graph, prepared, x = convnet
    broken = qf.convert(prepared)
    dequantize = next(n for n in broken.graph.nodes if n.name == "conv2d").args[1]
    broken.get_buffer(str(dequantize.args[1].target)).mul_(3)
    right, wrong = by_node(diagnosed(graph, prepared, [x])), by_node(diagnosed(graph, broken, [x]))
    assert wrong["conv2d"].local < 0
    for name in right.keys() - {"conv2d"}:
        assert wrong[name].local == pytest.approx(right[name].local)
    assert wrong["linear"].accumulated < right["linear"].accumulated - 10


def test_a_bad_channel_is_named(convnet):
    _, graph, prepared, x = convnet
    broken = qf.convert(prepared)
    dequantize = next(n for n in broken.graph.nodes if n.name == "conv2d_1").args[1]
    broken.get_buffer(str(dequantize.args[1].target))[5] *= 4
    found = diagnosed(graph, broken, [x]).layers[0]
    assert found.node == "conv2d_1"
    assert found.worst_channels(1)[0][0] == 5


def test_saturation_and_range_are_those_of_the_grid():
    x = torch.linspace(0, 1, 1001)[None]
    graph = qf.export(nn.Sequential(nn.ReLU(), nn.Linear(1001, 2)).eval(), (x,)).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x / 2], progress=False)
    given = by_node(diagnosed(graph, prepared, [x]))["input_1"]
    assert given.saturated == pytest.approx(0.5, abs=0.01)
    assert given.range_use == pytest.approx(2, abs=0.02)
    assert sum(given.histogram) == 1001
    assert given.histogram[-1] == pytest.approx(500, abs=3)
    assert given.histogram[1:-1] == pytest.approx([1001 / 32] * 16, abs=2)


@pytest.mark.parametrize("scheme", [DYNAMIC_INT8, DYNAMIC_W4])
def test_dynamic_ranges_and_groups(scheme):
    model, x = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 4)).eval(), torch.randn(16, 64)
    graph = qf.export(model, (x[:1],), dynamic_batch=True).module()
    converted = qf.convert(qf.prepare(graph, XNNPACKQuantizer(scheme)))
    assert all(found.excess < 3 for found in diagnosed(graph, converted, [x]).layers)
    dequantize = next(n for n in converted.graph.nodes if n.name == "linear_1").args[1]
    converted.get_buffer(str(dequantize.args[1].target)).mul_(2)
    assert diagnosed(graph, converted, [x]).layers[0].node == "linear_1"


def test_a_network_trained_in_integers():
    model, x = randomize_statistics(ConvNet(p=0.0)), torch.randn(8, 3, 16, 16)
    graph = qf.export(model.eval(), (x[:1],), dynamic_batch=True).module()
    trained = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(), qat=True), [x], progress=False)
    found = by_node(diagnosed(graph, trained, [x]))
    assert {"conv2d", "conv2d_1", "add", "linear"} <= found.keys()
    assert all(layer.local > 25 for layer in found.values())


def test_a_graph_of_stock_torchao(convnet):
    model, graph, _, x = convnet
    prepared = peers.stock_prepared(model, (x[:1],))
    peers.stock_calibrate(prepared, [x])
    converted = convert_pt2e(prepared)
    right = by_node(diagnosed(graph, converted, [x]))
    assert {"conv2d", "conv2d_1", "linear"} <= right.keys()
    assert all(found.local > 20 for found in right.values())
    scale = next(n for n in converted.graph.nodes if n.name == "linear").args[1].args[1]
    converted.get_buffer(str(scale.target)).mul_(3)
    assert diagnosed(graph, converted, [x]).layers[0].node == "linear"


def test_rewritten_layers_are_held_against_what_they_stand_for():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Hardsigmoid(), nn.Conv2d(4, 4, 1), nn.SiLU(), nn.AvgPool2d(2)).eval()
    x = torch.randn(8, 3, 6, 6)
    graph = qf.export(model, (x[:1],), dynamic_batch=True).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    found = diagnosed(graph, prepared, [x])
    assert {layer.layer for layer in found.layers} == {"", "0", "1", "2", "3", "4"}
    assert all(layer.excess < 6 for layer in found.layers)


def test_a_layer_that_was_written_in_another_form_is_named():
    model, x = (
        nn.Sequential(nn.Conv3d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 2)).eval(),
        torch.randn(3, 2, 6, 6, 6),
    )
    graph = qf.export(model, (x,)).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    with pytest.warns(qf.QuantflowWarning, match=r"0 \(conv3d\)"):
        diagnosed(graph, prepared, [x])


def test_it_prints_a_table_and_writes_json(convnet):
    _, graph, prepared, x = convnet
    found = diagnosed(graph, prepared, [x])
    lines = str(found).splitlines()
    assert len(lines) == len(found.layers) + 2
    assert found.layers[0].node in lines[1]
    rows = json.loads(found.to_json())["layers"]
    assert [row["node"] for row in rows] == [layer.node for layer in found.layers]
    assert rows[0]["local"] == found.layers[0].local
    effects = [math.inf if layer.effect is None else layer.effect for layer in found.by_effect()]
    assert effects == sorted(effects)


def test_bad_input_is_named(convnet):
    _, graph, prepared, x = convnet
    with pytest.raises(qf.QuantflowError, match="no float graph"):
        diagnosed(prepared, prepared, [x])
    with pytest.raises(qf.QuantflowError, match="no quantized graph"):
        diagnosed(graph, graph, [x])
    with pytest.raises(qf.QuantflowError, match="there is no data"):
        diagnosed(graph, prepared, [])
    with pytest.raises(qf.QuantflowError, match="batch 1"):
        diagnosed(graph, prepared, [x, x[:, :2]])
    other = qf.export(nn.Sequential(nn.Flatten(), nn.Tanh()), (x,)).module()
    with pytest.raises(qf.QuantflowError, match="no layer in common"):
        diagnosed(other, qf.convert(prepared), [x])


def test_what_is_written_in_place_is_not_blamed():
    torch.manual_seed(0)
    data = [(torch.randint(0, 10, (8,)), torch.randn(8, 4)) for _ in range(2)]
    graph = qf.export(WritesAPart().eval(), data[0]).module()
    found = diagnosed(graph, qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), data, progress=False), data)
    assert sum(errors.operator == "linear" for errors in found.layers) == 3
    assert all(errors.local > 30 for errors in found.layers), str(found)
