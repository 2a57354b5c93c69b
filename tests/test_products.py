"""Products of activations, and attention: exact in float, centred where the backend asks so, and float where int8 is worse."""

import copy

import pytest
import torch
from networks import sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.aten import aten, op
from quantflow.graph.rewrites import PRODUCT_REWRITES, rewrite
from quantizers import INT8, XNNPACKQuantizer


class Layers(nn.Module):
    """A function of the outputs of some linear layers that read one tensor."""

    def __init__(self, function, count):
        super().__init__()
        self.layers, self.function = nn.ModuleList(nn.Linear(8, 8) for _ in range(count)), function

    def forward(self, x):
        return self.function(*(layer(x) for layer in self.layers))


class Attention(nn.Module):
    """As most people write it, between projections, as a layer of the name ``core``."""

    def __init__(self, core):
        super().__init__()
        self.core, self.project, self.out = Layers(core, 3), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.out(self.core(self.project(x)))


def by_hand(query, key, value):
    return ((query @ key.transpose(-2, -1)) * 8**-0.5).softmax(-1) @ value


def biased(query, key, value):
    return (query @ key.transpose(-2, -1) + query[..., :1]).softmax(-1) @ value


FUNCTIONS = {
    "rank 3": (lambda a, b: a @ b.transpose(1, 2), 3),
    "rank 4": (lambda a, b: a @ b.transpose(-2, -1), 4),
    "rank 5": (lambda a, b: a.unsqueeze(2) @ b.mT.unsqueeze(2), 4),
    "attention": (F.scaled_dot_product_attention, 4),
    "attention of rank 3": (F.scaled_dot_product_attention, 3),
    "scaled attention": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3), 4),
}
REFUSED = {
    "broadcast": (lambda a, b: a @ b[:, :1].mT, 4, "no product broadcasts"),
    "fewer batches": (lambda a, b: a @ b[0].mT, 4, "no product broadcasts"),
    "vector": (lambda a, b: a @ b[0, 0], 3, "rank 3 and 1"),
    "matrices": (lambda a, b: a[0] @ b[0].mT, 3, "rank 2 and 2"),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), 4, "with a mask"),
    "masked": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=q @ k.mT), 4, "with a mask"),
    "shared": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 4, "share keys"),
}


def made(name):
    function, rank = (FUNCTIONS.get(name) or REFUSED[name])[:2]
    operands = 3 if "attention" in name or name in ("causal", "masked", "shared") else 2
    return Layers(function, operands), rank


def tokens(rank, batch):
    return torch.randn(batch, *(3, 6, 8)[4 - rank :])


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


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_says_why_a_product_stays_whole(name):
    model, rank = made(name)
    plan = XNNPACKQuantizer().plan(qf.export(model, (tokens(rank, 2),)).module())
    whole = [d for d in plan.floating if op(d.node) in PRODUCT_REWRITES]
    assert [REFUSED[name][2] in d.reason for d in whole] == [True], str(plan)


def test_a_plan_says_what_to_do_with_a_constant_operand():
    weight = torch.randn(8, 5)
    plan = XNNPACKQuantizer().plan(qf.export(Layers(lambda a: a @ weight, 1), (tokens(3, 2),)).module())
    assert "nn.Linear" in plan.floating[-1].reason


def observed(function, count):
    """Which tensor each observer behind the layers looks at, and whether its grid is centred on zero."""
    graph = qf.export(Layers(function, count), (torch.randn(4, 6, 8),)).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer())
    calls = [
        n for n in prepared.graph.nodes if n.op == "call_module" and n.args[0].op in ("call_function", "call_module")
    ]
    return [(n.args[0].name, prepared.get_submodule(n.target).symmetric) for n in calls if "weight" not in n.name]


def test_a_second_operand_lies_with_its_layer_on_one_centred_grid():
    found = observed(lambda a, b: torch.bmm(a, b.transpose(1, 2)), 2)
    assert found == [("linear", False), ("linear_1", True), ("transpose", True), ("bmm", False)]


def test_parts_of_one_layer_share_its_grid_with_the_second_operand():
    found = observed(lambda a: torch.bmm(a[..., :4], a[..., 4:].transpose(1, 2)), 1)
    assert [symmetric for _, symmetric in found] == [True] * (len(found) - 1) + [False]


def test_what_has_one_sign_is_centred_only_where_nothing_else_reads_it():
    def alone(a, b):
        return torch.bmm(a, F.relu(b).transpose(1, 2))

    def read_by_others(a, b):
        b = F.relu(b)
        return torch.bmm(a, b.transpose(1, 2)), b * 2

    assert dict(observed(alone, 2))["relu"]
    found = observed(read_by_others, 2)
    assert not dict(found)["relu"]  # the sum keeps all its levels
    assert [
        symmetric for name, symmetric in found if name not in ("linear", "relu", "transpose", "bmm", "mul_tensor")
    ] == [
        True  # and the product reads it requantized
    ]


def test_one_tensor_in_both_operands():
    found = observed(lambda a: torch.bmm(a.transpose(1, 2), a), 1)
    assert found[:2] == [("linear", True), ("transpose", True)]


MASK = torch.ones(6, 6, dtype=torch.bool).tril()
SOFTMAXES = {
    "masked_fill": lambda s: s.masked_fill(~MASK, -torch.inf).softmax(-1),
    "where": lambda s: torch.where(MASK, s, -torch.inf).softmax(-1),
    "added mask": lambda s: (s + torch.zeros(6, 6).masked_fill(~MASK, -1e4)).softmax(-1),
    "divided": lambda s: (s / 3.0).softmax(-1),
    "in float32": lambda s: F.softmax(s, dim=-1, dtype=torch.float32).to(s.dtype),
    "of a cast": lambda s: F.softmax(s.float(), dim=-1).type_as(s),
    "capped": lambda s: (torch.tanh(s / 5) * 5).softmax(-1),
    "permuted": lambda s: s.permute(0, 2, 1, 3).softmax(-1).permute(0, 2, 1, 3),
    "dropout": lambda s: F.dropout(s.softmax(-1), 0.1, training=False),
    "by hand": lambda s: (
        (s - s.amax(-1, keepdim=True)).exp() / (s - s.amax(-1, keepdim=True)).exp().sum(-1, keepdim=True)
    ),
    "logarithm": lambda s: s.log_softmax(-1).exp(),
}


@pytest.mark.parametrize("name", SOFTMAXES)
def test_both_products_beside_any_softmax_stay_float(name):
    model = Attention(lambda query, key, value: SOFTMAXES[name](query @ key.mT) @ value).eval()
    plan = XNNPACKQuantizer().plan(qf.export(model, (torch.randn(2, 3, 6, 8),)).module())
    products = [d for d in plan.decisions if op(d.node) is aten.bmm.default]
    assert [d.scheme for d in products] == [None, None], str(plan)


@pytest.mark.parametrize("core", [by_hand, biased, F.scaled_dot_product_attention])
def test_products_beside_a_softmax_stay_float_unless_asked(core):
    model, x = Attention(core).eval(), torch.randn(2, 3, 6, 8)
    graph = qf.export(model, (x,)).module()
    plan = XNNPACKQuantizer().plan(graph)
    products = [d for d in plan.decisions if op(d.node) is aten.bmm.default]
    assert ["softmax" in d.reason for d in products] == [True, True]
    assert not [d for d in plan.integer if any(op(user) is aten.softmax.int for user in d.tail.users)]
    asked = XNNPACKQuantizer(overrides={"core": INT8}, strict=True)
    assert [d.node for d in asked.plan(graph).floating if op(d.node) is aten.bmm.default] == []
    for quantizer in (XNNPACKQuantizer(), asked):
        converted = qf.convert(qf.calibrate(qf.prepare(graph, quantizer), [x], progress=False))
        program = qf.export(converted, (x,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
        assert program.delegation.calls == quantizer.plan(graph).calls == 1
        assert program.delegation.floating["aten::bmm"] == (0 if quantizer is asked else 2)
        assert sqnr(converted(x).detach(), program(x)) > 35
        assert sqnr(model(x).detach(), program(x)) > 25


def test_attention_trains_and_converts():
    model, x = Attention(F.scaled_dot_product_attention), torch.randn(2, 3, 6, 8)
    quantizer = XNNPACKQuantizer(overrides={"core": INT8})
    prepared = qf.prepare(qf.export(model, (x,)).module(), quantizer, qat=True)
    qf.train(prepared, [(x, torch.zeros(2, 3, 6, 8))] * 3, loss=F.mse_loss, epochs=1, lr=1e-3, progress=False)
    converted = qf.convert(prepared)
    assert sqnr(prepared(x).detach(), converted(x).detach()) > 25
