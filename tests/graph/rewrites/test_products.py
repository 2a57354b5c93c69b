"""Products of activations, and attention: exact in float, also where batches and tokens vary."""

import copy

import pytest
import torch
from attention import FUNCTIONS, REFUSED, Layers, made, tokens
from networks import sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.aten import aten, op
from quantflow.graph.rewrites import PRODUCT_REWRITES, rewrite
from quantizers import XNNPACKQuantizer


@pytest.mark.parametrize("name", [*FUNCTIONS, *REFUSED])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_function_and_gradients_stay(name, dynamic):
    model, rank = made(name)
    graph = qf.export(model, (tokens(rank, 2),), dynamic_batch=dynamic).module()
    rewritten = rewrite(copy.deepcopy(graph), PRODUCT_REWRITES)
    gone = not {op(n) for n in rewritten.graph.nodes} & set(PRODUCT_REWRITES)
    assert gone == (name in FUNCTIONS)
    x = tokens(rank, 5 if dynamic else 2)
    assert torch.allclose(model(x), rewritten(x), rtol=1e-5, atol=1e-5)
    for network in (model, rewritten):
        network(x).square().sum().backward()
    for layer in ("layers.0.weight", "layers.1.weight"):
        given, expected = (network.get_parameter(layer).grad for network in (rewritten, model))
        assert torch.allclose(given, expected, rtol=1e-4, atol=1e-5)
    assert all("val" in n.meta for n in rewritten.graph.nodes if n.op == "call_function")


class Heads(nn.Module):
    """Attention over two heads, and a function of what it puts out, [batch, heads, tokens, 4]."""

    def __init__(self, behind):
        super().__init__()
        self.project, self.out, self.behind = nn.Linear(8, 24), nn.Linear(8, 8), behind

    def forward(self, x):
        batch, count, _ = x.shape
        query, key, value = (t.view(batch, count, 2, 4).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        return self.out(self.behind(F.scaled_dot_product_attention(query, key, value), batch, count))


def written_through_a_view(y, batch, count):
    view = y.transpose(1, 2).view(batch, count, 8)
    view.relu_()
    return y.transpose(1, 2).reshape(batch, count, 8)


def flat(y, batch, count):
    return y.transpose(1, 2).reshape(batch, count, 8)


BEHIND = {
    "a copy": flat,
    "a view": lambda y, b, n: y.transpose(1, 2).view(b, n, 8),
    "scaled, then a view": lambda y, b, n: (y * 2).transpose(1, 2).view(b, n, 8),
    "written through a view": written_through_a_view,
    "strides of its own": lambda y, b, n: y.as_strided((b, n, 8), (n * 8, 8, 1)),
    "parts": lambda y, b, n: torch.cat([t.transpose(1, 2).view(-1, n, 8) for t in y.chunk(2, 0)]),
    "examples": lambda y, b, n: torch.stack([t.transpose(0, 1).view(n, 8) for t in y.unbind(0)]),
    "sorted": lambda y, b, n: y.transpose(1, 2).sort(-1)[0].view(b, n, 8),
    "viewed as another": lambda y, b, n: y.transpose(1, 2).view_as(torch.empty(b, n, 8)),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_attention_of_torch_with_tokens_outside(dynamic):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x, need_weights=False)[0]

    model, x = Block().eval(), torch.randn(3, 6, 8)
    with torch.no_grad():
        graph = qf.export(model, (x,), dynamic_batch=dynamic).module()
        rewritten = rewrite(graph, PRODUCT_REWRITES)
        assert sum(op(n) is aten.bmm.default for n in rewritten.graph.nodes) == 2
        assert torch.allclose(model(x), rewritten(x), atol=1e-6)


@pytest.mark.filterwarnings("ignore::quantflow.QuantflowWarning")
@pytest.mark.parametrize("name", BEHIND)
def test_what_views_the_result_finds_it_as_it_lay(name):
    model, x = Heads(BEHIND[name]).eval(), torch.randn(4, 6, 8)
    with torch.no_grad():  # with gradients the kernel of attention may be another, which puts heads outside
        graph = qf.export(model, (x,)).module()
        rewritten = rewrite(copy.deepcopy(graph), PRODUCT_REWRITES)
        assert sum(op(n) is aten.bmm.default for n in rewritten.graph.nodes) == 2
        assert torch.allclose(model(x), rewritten(x), atol=1e-5)
        converted = qf.convert(qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False))
        assert sqnr(model(x), converted(x)) > 20


def test_dropout_within_attention_is_left_alone():
    model = Layers(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), 3)
    plan = XNNPACKQuantizer().plan(qf.export(model, (tokens(4, 2),)).module())
    assert "drops out" in next(d for d in plan.floating if op(d.node) in PRODUCT_REWRITES).reason


def test_a_batch_of_constant_matrices_is_an_operand():
    weights, x = torch.randn(3, 8, 5), torch.randn(3, 6, 8)
    model = Layers(lambda a: a @ weights, 1).eval()
    graph = qf.export(model, (x,)).module()
    assert not XNNPACKQuantizer().plan(graph).floating
    converted = qf.convert(qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False))
    program = qf.export(converted, (x,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    assert sqnr(converted(x).detach(), program(x)) > 60
    assert sqnr(model(x).detach(), program(x)) > 25


@pytest.mark.parametrize("function", [lambda a, b: a @ b.mT, lambda a, b: F.scaled_dot_product_attention(a, b, b)])
def test_batches_and_tokens_both_vary(function):
    shapes = {"x": {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=64)}}
    model = Layers(function, 2)
    graph = qf.export(model, (torch.randn(4, 6, 8),), dynamic_shapes=shapes).module()
    rewritten = rewrite(graph, PRODUCT_REWRITES)
    assert any(op(n) is aten.bmm.default for n in rewritten.graph.nodes)
    x = torch.randn(3, 11, 8)
    assert torch.allclose(model(x), rewritten(x), atol=1e-6)


def test_more_tokens_than_the_example_has():
    shapes = {"x": {1: torch.export.Dim("tokens", min=2, max=64)}}
    model = Layers(F.scaled_dot_product_attention, 3)
    graph = qf.export(model, (torch.randn(4, 6, 8),), dynamic_shapes=shapes).module()
    rewritten = rewrite(graph, PRODUCT_REWRITES)
    assert sum(op(n) is aten.bmm.default for n in rewritten.graph.nodes) == 2
    x = torch.randn(4, 11, 8)
    assert torch.allclose(model(x), rewritten(x), atol=1e-6)
