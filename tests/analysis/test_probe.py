"""ProbeResult: what the runtime has within the delegate is what the graph says, and where it is not, that operator is named."""

import itertools
import json

import pytest
import torch
from executorch.exir.pass_base import PassResult
from networks import ConvNet, WritesAPart, randomize_statistics
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.analysis.intermediate_outputs import intermediate_outputs_of, with_intermediate_outputs
from quantflow.analysis.probe_result import Probed, ProbeResult
from quantflow.delegates.xnnpack.delegate import Xnnpack
from quantizers import DYNAMIC_INT8, XNNPACKQuantizer

pytestmark = pytest.mark.slow

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
    intermediates = intermediate_outputs_of(converted)
    opened = with_intermediate_outputs(converted, intermediates)
    with torch.no_grad():
        y, *values = opened(X)
        assert torch.equal(y, converted(X))
    assert len(values) == len(intermediates)
    grids = [
        (value / intermediate.step)
        for value, intermediate in zip(values, intermediates, strict=True)
        if intermediate.step is not None
    ]
    assert grids
    assert all(torch.allclose(grid, grid.round(), atol=1e-3) for grid in grids)


def test_every_operator_of_a_delegate_is_the_graph_to_the_bit(network):
    graph, prepared = network
    found = qf.probe(prepared, [X], float_graph=graph, calls=4, progress=False)
    assert found.calls == 4
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
    behind = found.tensors[found.tensors.index(first) + 1 :]
    assert behind
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
    assert found.calls == 2
    path = found.plot(tmp_path / "probe.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_bad_input_names_stage_and_remedy(network):
    graph, prepared = network
    for bad, data, options, words in (
        (graph, [X], {}, "no quantized graph"),
        (prepared, [], {}, "no data"),
        (prepared, [X[:, :2]], {}, "shape"),
        (prepared, [X], {"calls": 0}, "0 calls"),
        (prepared, [X], {"calls": 2.5}, "2.5 calls"),
        (prepared, [X], {"float_graph": prepared}, "no float graph"),
    ):
        with pytest.raises(qf.QuantflowError, match=words) as raised:
            qf.probe(bad, data, progress=False, **options)
        assert raised.value.stage == "probe"
        assert raised.value.remedy


class Parts(nn.Module):
    """A convolution in float between others in integers, and what is done with it."""

    def __init__(self, function):
        super().__init__()
        self.first, self.middle, self.last = (nn.Conv2d(c, 8, 3, padding=1) for c in (3, 8, 8))
        self.function = function

    def forward(self, x):
        return self.last(self.function(self.middle(F.relu(self.first(x)))))


def written_over(y):
    z = torch.sin(y)
    z += y
    return F.hardswish(z, inplace=True).softmax(-1)


@pytest.mark.parametrize(
    "function", [written_over, lambda y: torch.sin(y) + torch.cos(y)], ids=["in place", "read twice"]
)
def test_what_stays_in_float_is_seen_before_it_is_written_over(function):
    skip = ["middle", lambda node: node.name.startswith(("add", "hardswish"))]
    prepared = quantized(Parts(function), quantizer=XNNPACKQuantizer(skip=skip))[1]
    found = qf.probe(prepared, [X], calls=2, progress=False)
    assert "conv2d" in {t.operator for t in found.tensors if t.step is None}
    assert all(t.local > 60 for t in found.tensors), str(found)


def test_a_faulty_layer_that_is_read_in_float_and_in_integers():
    class Both(Chain):
        def forward(self, x):
            y = self.layers[2](self.layers[1](self.layers[0](x)))
            return self.layers[3](y).mean((2, 3)), torch.sin(y).mean((2, 3))

    prepared = quantized(Both(), quantizer=XNNPACKQuantizer(skip=["layers.2"]))[1]
    found = qf.probe(prepared, [X], delegate=Faulty(10), calls=2, progress=False)
    assert found.ranked()[0].layer == "layers.2"
    assert next(t for t in found.tensors if t.operator == "sin").local > 80


def test_calls_of_several_shapes():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x):
            return F.relu(self.linear(x))

    shapes = {"x": {1: torch.export.Dim("tokens", min=2, max=64)}}
    graph = qf.export(Rows().eval(), (torch.randn(1, 6, 8),), dynamic_shapes=shapes).module()
    data = [torch.randn(1, 6, 8), torch.randn(1, 9, 8)]
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), data, progress=False)
    found = qf.probe(prepared, data, float_graph=graph, progress=False)
    assert found.calls == 2
    assert all(t.changed == 0 for t in found.tensors)


def test_no_number_is_first_and_written_as_such():
    good, bad = (Probed("n", "", "add", None, local, None, 0.0, local, None) for local in (100.0, float("nan")))
    found = ProbeResult((good, bad), 1, 1)
    assert found.ranked()[0] is bad
    assert [t["local"] for t in json.loads(found.to_json())["tensors"]] == [100.0, "nan"]


def test_a_network_with_state_and_a_picture_that_can_not_be_written_are_named(network):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.register_buffer("count", torch.zeros(1))

        def forward(self, x):
            self.count.add_(1)
            return self.conv(x) * self.count

    prepared = quantized(Counting())[1]
    before = prepared.get_buffer("count").clone()
    with pytest.raises(qf.QuantflowError, match="writes it") as raised:
        qf.probe(prepared, [X], progress=False)
    assert (raised.value.stage, raised.value.node) == ("probe", "count")
    assert torch.equal(prepared.get_buffer("count"), before)
    found = ProbeResult((Probed("n", "", "add", None, 1.0, None, 0.0, 1.0, None),), 1, 1)
    for path in ("no/such/folder/a.png", "a.nothing"):
        with pytest.raises(qf.QuantflowError) as raised:
            found.plot(path)
        assert raised.value.stage == "probe"


def test_what_is_written_in_place_is_the_graphs_to_the_bit():
    torch.manual_seed(0)
    data = [(torch.randint(0, 10, (8,)), torch.randn(8, 4)) for _ in range(2)]
    graph = qf.export(WritesAPart().eval(), data[0]).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), data, progress=False)
    found = qf.probe(prepared, data, float_graph=graph, progress=False)
    assert {"embedding", "add", "slice"} <= {t.operator for t in found.tensors}
    assert all(t.changed == 0 for t in found.tensors), str(found)
