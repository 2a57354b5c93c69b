"""Plans: each operator with the rule that takes it, or why it stays in float; planning changes nothing."""

import torch
from networks import ConvNet
from torch import nn
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

import quantflow as qf
from quantizers import RuleQuantizer, XNNPACKQuantizer

X = torch.randn(4, 3, 16, 16)


def graph_of(model, x=X):
    return qf.export(model, (x,)).module().eval()


def test_plan_names_every_operator_and_what_is_fused():
    plan = XNNPACKQuantizer().plan(graph_of(ConvNet()))
    fused = [[n.name for n in d.nodes] for d in plan.integer]
    assert fused[0] == ["conv2d", "batch_norm", "hardtanh_"]
    assert fused[1] == ["conv2d_1", "batch_norm_1", "hardtanh__1"]
    assert not plan.floating
    text = str(plan)
    assert "stem" in text
    assert "conv2d + batch_norm + hardtanh" in text
    assert "6 of 6 operators become integers" in text


def test_planning_changes_nothing():
    graph = graph_of(ConvNet())
    code = graph.code
    XNNPACKQuantizer().plan(graph)
    assert graph.code == code
    assert not any(Q_ANNOTATION_KEY in n.meta for n in graph.graph.nodes)


def test_plan_before_and_after_folding_agree():
    graph = graph_of(ConvNet())
    prepared = qf.prepare(graph, XNNPACKQuantizer())
    integer = XNNPACKQuantizer().plan(graph).integer
    observed = [n for n in prepared.graph.nodes if n.op == "call_module" and n.args[0].op == "call_function"]
    assert len(observed) == len({d.tail.name for d in integer})


class Gaps(nn.Module):
    def forward(self, x, scale):
        y = torch.nn.functional.interpolate(x, scale_factor=2, mode="bilinear")
        y = torch.add(y, y, alpha=2)
        y = y * 2.0
        return torch.sin(y) * scale


def test_plan_says_why_not():
    graph = qf.export(Gaps(), (torch.randn(1, 3, 8, 8), torch.randn(1))).module()
    plan = XNNPACKQuantizer().plan(graph)
    reasons = {d.node.name: d.reason for d in plan.floating}
    assert "bilinearly in float only" in reasons["upsample_bilinear2d"]
    assert "alpha" in reasons["add"]
    assert any(d.rule.name == "multiply" for d in plan.integer)  # by a constant
    assert "float only" in reasons["sin"]
    assert "no rule" in {d.node.name: d.reason for d in RuleQuantizer().plan(graph).floating}["sin"]
