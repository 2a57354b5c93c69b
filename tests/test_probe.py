"""Probing: what the runtime has within the delegate is what the graph says, and where it is not, that operator is named."""

import itertools
import json

import pytest
import torch
from executorch.exir.pass_base import PassResult
from networks import ConvNet, randomize_statistics
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.delegates.xnnpack import Xnnpack
from quantflow.evidence.taps import tapped, taps_of
from quantizers import DYNAMIC_INT8, XNNPACKQuantizer

X = torch.randn(6, 3, 16, 16)


def quantized(model, x=X, quantizer=None):
    graph = qf.export(randomize_statistics(model).eval(), (x[:2],), dynamic_batch=True).module()
    return graph, qf.calibrate(qf.prepare(graph, quantizer or XNNPACKQuantizer()), [x], progress=False)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return quantized(ConvNet())


def test_taps_change_nothing_and_hold_what_the_graph_computes(network):
    converted = qf.convert(network[1])
    taps = taps_of(converted)
    opened = tapped(converted, taps)
    with torch.no_grad():
        y, *values = opened(X)
        assert torch.equal(y, converted(X))
    assert len(values) == len(taps)
    grids = [(value / tap.step) for value, tap in zip(values, taps, strict=True) if tap.step is not None]
    assert grids
    assert all(torch.allclose(grid, grid.round(), atol=1e-3) for grid in grids)


def test_every_operator_of_a_delegate_is_the_graph_to_the_bit(network):
    graph, prepared = network
    found = qf.probe(prepared, [X], float_graph=graph, calls=4, progress=False)
    assert found.examples == 4
    assert found.delegate_calls == 1
    operators = [t.operator for t in found.tensors]
    assert operators[0] == "input"
    assert operators.count("conv2d") == sum(isinstance(m, nn.Conv2d) for m in ConvNet().modules())
    assert all(t.changed == 0 and t.local == float("inf") for t in found.tensors)
    assert all(t.against_float is None or t.against_float > 15 for t in found.tensors)
    assert sum(t.against_float is not None for t in found.tensors) > len(found.tensors) // 2
    assert "to the bit" in str(found)


class Faulty(Xnnpack):
    """XNNPACK behind a pass that makes another convolution of one layer, of the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels

    def passes(self):
        return [*super().passes(), self.spoil]

    def spoil(self, graph_module):
        for node in graph_module.graph.nodes:
            if "convolution" in str(node.target) and node.meta["val"].shape[1] == self.channels:
                node.args = (*node.args[:4], [2, 2], [2, 2], *node.args[6:])
        return PassResult(graph_module, True)


class Chain(nn.Module):
    """Convolutions that can be told by their channels."""

    def __init__(self):
        super().__init__()
        sizes = [3, 8, 9, 10, 11, 12]
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(sizes))

    def forward(self, x):
        for layer in self.layers:
            x = F.relu(layer(x))
        return x.mean((2, 3))


@pytest.mark.parametrize("channels", [8, 10, 12])
def test_the_layer_that_the_program_computes_otherwise_is_first_and_alone(channels):
    prepared = quantized(Chain())[1]
    found = qf.probe(prepared, [X], delegate=Faulty(channels), calls=2, progress=False)
    first, *others = found.ranked()
    assert first.layer == f"layers.{channels - 8}"
    assert first.most_steps > 5
    assert all(t.changed == 0 for t in others)
    behind = [t for t in found.tensors if t.layer > first.layer]
    assert all(t.accumulated < 40 for t in behind)  # they have its error, and it is not theirs
    assert json.loads(found.to_json())["tensors"][0]["local"] is None


def test_float_and_dynamic_layers_are_seen_too():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

        def forward(self, x):
            return self.last(torch.sin(self.norm(self.first(x))))

    x = torch.randn(5, 8)
    for quantizer in (XNNPACKQuantizer(skip=["first"]), XNNPACKQuantizer(DYNAMIC_INT8)):
        graph, prepared = quantized(Mixed(), x, quantizer)
        found = qf.probe(prepared, [x], float_graph=graph, calls=2, progress=False)
        operators = {t.operator: t for t in found.tensors}
        assert {"linear", "layer_norm", "sin"} <= set(operators)
        assert operators["layer_norm"].step is None
        assert all(t.local > 80 or t.most_steps == 0 for t in found.tensors if t.layer != "last")
        assert operators["linear"].local > 30


def test_a_fixed_batch_runs_whole_and_pictures_are_drawn(tmp_path):
    graph = qf.export(Chain().eval(), (X[:2],)).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [X[:2]], progress=False)
    found = qf.probe(prepared, [X[:2], X[2:4], X[4:]], calls=2, progress=False)
    assert found.examples == 2
    path = found.plot(tmp_path / "probe.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bad_input_names_stage_and_remedy(network):
    graph, prepared = network
    for bad, data, options, words in (
        (graph, [X], {}, "no quantized graph"),
        (prepared, [], {}, "no data"),
        (prepared, [X[:, :2]], {}, "shape"),
        (prepared, [X], {"calls": 0}, "0 calls"),
        (prepared, [X], {"float_graph": prepared}, "no float graph"),
    ):
        with pytest.raises(qf.QuantflowError, match=words) as raised:
            qf.probe(bad, data, progress=False, **options)
        assert raised.value.stage == "probe"
        assert raised.value.remedy
