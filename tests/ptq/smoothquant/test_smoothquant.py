"""SmoothQuant: the function in float stays, the difficulty is shared as asked, outlying features cost less."""

import copy

import pytest
import torch
from networks import sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.aten import LINEARS, argument, op
from quantflow.graph.parameters import reads_of, tensor_of
from quantflow.ptq import smooth
from quantflow.ptq.channel_ranges import channel_ranges
from quantflow.ptq.channel_scaling import multiply_inputs
from quantflow.ptq.smoothquant.features import linear_readers
from quantflow.ptq.smoothquant.smoothquant import _divide
from quantizers import XNNPACKQuantizer


class Attention(nn.Module):
    """One norm that query, key and value read, one that an MLP reads, and a norm that two kinds of nodes read."""

    def __init__(self):
        super().__init__()
        self.norm, self.norm2, self.last = nn.LayerNorm(16), nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x):
        y = self.norm(x).transpose(0, 1)
        y = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)).transpose(0, 1)
        x = x + self.out(y)
        x = x + self.down(F.gelu(self.up(F.dropout(self.norm2(x), 0.1, self.training))))
        y = self.last(x)
        return self.head(y[:, 0]) + y.mean((1, 2))[:, None]


class Scaled(nn.Module):
    """A norm without a weight of its own, and a learned factor after it."""

    def __init__(self):
        super().__init__()
        self.norm, self.factor, self.linear = (
            nn.LayerNorm(16, elementwise_affine=False),
            nn.Parameter(torch.rand(16)),
            nn.Linear(16, 4),
        )

    def forward(self, x):
        return self.linear(self.factor * self.norm(x))


ROWS = torch.randn(8, 5, 16)
# Each with the nodes whose features are divided.
NETWORKS = {
    "attention": (Attention(), ROWS, ["layer_norm", "layer_norm_1"]),
    "plain norm": (nn.Sequential(nn.LayerNorm(16, elementwise_affine=False), nn.Linear(16, 4)), ROWS, ["layer_norm"]),
    "no bias": (nn.Sequential(nn.LayerNorm(16, bias=False), nn.Flatten(0, 1), nn.Linear(16, 4)), ROWS, ["layer_norm"]),
    "rms norm": (nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 4, bias=False)), ROWS, ["rms_norm"]),
    "batch norm": (nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 4)), ROWS[:, 0], ["batch_norm"]),
    "linear": (nn.Sequential(nn.Linear(16, 8), nn.Dropout(), nn.Linear(8, 4)), ROWS, ["linear"]),
    "factor": (Scaled(), ROWS, ["mul"]),
}


def captured(model, x):
    """With a few features far out."""
    torch.manual_seed(1)
    for module in model.modules():
        if getattr(module, "weight", None) is not None and module.weight.ndim == 1:
            module.weight.data = torch.exp(1.2 * torch.randn_like(module.weight))
    if hasattr(model, "factor"):
        model.factor.data = torch.exp(1.2 * torch.randn(16))
    elif isinstance(model[0] if isinstance(model, nn.Sequential) else None, nn.Linear):
        model[0].weight.data *= torch.exp(1.2 * torch.randn(8, 1))
    return qf.export(model.eval(), (x,), dynamic_batch=True).module()


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_the_difficulty_is_shared_as_asked(name, strength):
    model, x, sources = NETWORKS[name]
    graph = captured(copy.deepcopy(model), x)
    before = {k: v.clone() for k, v in graph.state_dict().items()}
    found = smooth(graph, [x], strength)
    torch.testing.assert_close(found(x), graph(x), rtol=1e-4, atol=1e-4)
    nodes = {n.name: n for n in found.graph.nodes}
    ranges = channel_ranges(found, {nodes[n]: -1 for n in sources}, [(x,)])
    for source, seen in ranges.items():
        readers, todo = [], [source]
        while todo:
            for user in todo.pop().users:
                (readers if op(user) in LINEARS else todo).append(user)
        columns = torch.stack([tensor_of(found, argument(n, "weight")).abs().amax(0) for n in readers]).amax(0).double()
        # s = x**a / w**(1 - a): features become (x·w)**(1 - a), columns (x·w)**a.
        product = seen * columns
        torch.testing.assert_close(seen, product ** (1 - strength), rtol=1e-3, atol=0)
        torch.testing.assert_close(columns, product**strength, rtol=1e-3, atol=0)
    assert all(torch.equal(before[k], v) for k, v in graph.state_dict().items()), "the graph was to be left as it was"
    untouched = {"last.weight", "last.bias", "head.weight", "down.weight", "out.weight"} & set(before)
    assert all(torch.equal(before[k], found.state_dict()[k]) for k in untouched)


@pytest.mark.filterwarnings("ignore:.*float between integers")
@pytest.mark.parametrize("name", NETWORKS)
def test_outlying_features_cost_less(name):
    model, x, sources = NETWORKS[name]
    graph = qf.export(copy.deepcopy(model).eval(), (x,), dynamic_batch=True).module()
    for node in graph.graph.nodes:
        if node.name in sources:  # the same function, with features of very unlike range
            scale = torch.exp(2 * torch.randn(node.meta["val"].shape[-1])).double()
            for layer in linear_readers(graph, node, reads_of(graph.graph)):
                multiply_inputs(graph, layer, scale)
            _divide(graph, node, scale)
    graph.recompile()
    expected = graph(x)

    def quality(g):
        prepared = qf.prepare(g, XNNPACKQuantizer())
        return sqnr(expected, qf.convert(qf.calibrate(prepared, [x], progress=False))(x))

    assert quality(smooth(graph, [x])) > quality(graph) + 3


class Elsewhere(nn.Module):
    """Norms that no scale can be folded into: read as they are, over two dimensions, shared by two calls."""

    def __init__(self):
        super().__init__()
        self.norm, self.wide, self.twice = nn.LayerNorm(16), nn.LayerNorm((5, 16)), nn.LayerNorm(16)
        self.linear = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        x = y + self.linear[0](y)
        x = torch.tanh(self.linear[1](self.wide(x)))
        x = torch.tanh(self.linear[2](self.twice(x)))
        return torch.tanh(self.linear[3](self.twice(x)))


def test_what_else_reads_a_norm_keeps_it_as_it_is_and_that_is_said():
    graph = qf.export(Elsewhere().eval(), (ROWS,), dynamic_batch=True).module()
    with pytest.warns(qf.QuantflowWarning, match="stays as it is"):
        found = smooth(graph, [ROWS])
    assert all(torch.equal(v, found.state_dict()[k]) for k, v in graph.state_dict().items())


def test_bad_input_names_stage_and_remedy():
    model, x, _ = NETWORKS["linear"]
    graph = qf.export(model, (x,), dynamic_batch=True).module()
    for bad, data, strength, words in (
        (model, [x], 0.5, "no captured graph"),
        (qf.prepare(graph, XNNPACKQuantizer()), [x], 0.5, "prepared already"),
        (graph, [], 0.5, "no data"),
        (graph, [torch.randn(8, 5)], 0.5, "shape"),
        (graph, [x], 1.5, "between 0 and 1"),
    ):
        with pytest.raises(qf.QuantflowError, match=words) as raised:
            smooth(bad, data, strength)
        assert raised.value.stage == "smooth"
        assert raised.value.remedy
