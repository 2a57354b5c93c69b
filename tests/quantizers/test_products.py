"""Products in a plan: why one stays whole, and float beside a softmax, where int8 is worse."""

import pytest
import torch
from attention import REFUSED, Attention, Layers, biased, by_hand, made, tokens
from networks import sqnr
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.aten import aten, op
from quantflow.graph.rewrites import PRODUCT_REWRITES
from quantizers import INT8, XNNPACKQuantizer


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_says_why_a_product_stays_whole(name):
    model, rank = made(name)
    plan = XNNPACKQuantizer().plan(qf.export(model, (tokens(rank, 2),)).module())
    whole = [d for d in plan.floating if op(d.node) in PRODUCT_REWRITES]
    assert [REFUSED[name][2] in d.reason for d in whole] == [True], str(plan)


def test_a_product_with_a_constant_matrix_is_a_linear_layer():
    weight, x = torch.randn(8, 5), tokens(3, 2)
    model = Layers(lambda a: a @ weight, 1)
    graph = qf.export(model, (x,)).module()
    plan = XNNPACKQuantizer().plan(graph)
    assert [decision.rule.name for decision in plan.integer] == ["linear", "linear"]
    assert not plan.floating
    converted = qf.convert(qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False))
    assert sqnr(model(x).detach(), converted(x)) > 30


def test_a_plan_says_what_to_do_with_a_constant_first_operand():
    weight = torch.randn(5, 6)
    plan = XNNPACKQuantizer().plan(qf.export(Layers(lambda a: weight @ a, 1), (tokens(3, 2),)).module())
    assert "nn.Linear" in plan.floating[-1].reason


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


def test_an_infinite_mask_stays_float_even_if_integers_are_asked_for():
    torch.manual_seed(0)
    model, x = Attention(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)), tokens(4, 2)
    quantizer = XNNPACKQuantizer(overrides={"core": INT8})
    graph = qf.export(model, (x,)).module()
    assert any("infinite" in decision.reason for decision in quantizer.plan(graph).floating)
    converted = qf.convert(qf.calibrate(qf.prepare(graph, quantizer), [x], progress=False))
    assert sqnr(model(x).detach(), converted(x)) > 20
