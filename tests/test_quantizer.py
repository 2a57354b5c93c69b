"""Plans, overrides, and a quantizer of one's own."""

import copy

import pytest
import torch
from networks import ConvNet, randomize_statistics
from torch import nn
from torchao.quantization.pt2e.quantizer.quantizer import Q_ANNOTATION_KEY

import quantflow as qf
from quantflow.graph.aten import aten
from quantizers import DYNAMIC_INT8, INT8, Rule, RuleQuantizer, Scheme, TensorScheme, XNNPACKQuantizer

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
        y = torch.nn.functional.avg_pool2d(x, 3, ceil_mode=True)
        y = torch.add(y, y, alpha=2)
        y = y * 2.0
        return torch.sin(y) * scale


def test_plan_says_why_not():
    graph = qf.export(Gaps(), (torch.randn(1, 3, 8, 8), torch.randn(1))).module()
    plan = XNNPACKQuantizer().plan(graph)
    reasons = {d.node.name: d.reason for d in plan.floating}
    assert "without a ceiling" in reasons["avg_pool2d"]
    assert "alpha" in reasons["add"]
    assert any(d.rule.name == "multiply" for d in plan.integer)  # by a constant
    assert "float only" in reasons["sin"]
    assert "no rule" in {d.node.name: d.reason for d in RuleQuantizer().plan(graph).floating}["sin"]


@pytest.mark.parametrize("where", ["head", "he*", nn.Linear, lambda n: n.target is aten.linear.default])
def test_skip(where):
    plan = XNNPACKQuantizer(skip=[where]).plan(graph_of(ConvNet()))
    assert [d.node.name for d in plan.floating] == ["linear"]
    assert "override" in plan.floating[0].reason


def test_overrides_by_layer_later_wins():
    fine = Scheme(weight=TensorScheme(bits=4, symmetric=True, per_channel=True))
    quantizer = XNNPACKQuantizer(None, overrides={nn.Conv2d: INT8, "depthwise": fine, "head": DYNAMIC_INT8})
    plan = quantizer.plan(graph_of(ConvNet()))
    assert {d.node.name: str(d.scheme) for d in plan.integer} == {
        "conv2d": "int8",
        "conv2d_1": "w4a8",
        "linear": "dynamic int8",
    }


def test_a_skipped_layer_stays_float_to_the_end():
    model = randomize_statistics(ConvNet()).eval()
    for qat in (False, True):
        prepared = qf.prepare(graph_of(model), XNNPACKQuantizer(skip=["depthwise"]), qat=qat)
        converted = qf.convert(qf.calibrate(prepared, [X], progress=False))
        assert converted.get_parameter("depthwise.weight").is_floating_point()
        assert not any(k.startswith("depthwise") and "quantized" in k for k, _ in converted.named_buffers())
        assert torch.allclose(converted(X), model(X), atol=0.1 * float(model(X).abs().max()))


class AcceleratorQuantizer(RuleQuantizer):
    """An accelerator that multiplies matrices in int8 with per-tensor weights, and fuses relu."""

    rules = (
        Rule(
            "conv",
            frozenset({aten.conv2d.default}),
            weight="weight",
            batch_norm=True,
            clamps=frozenset({aten.relu.default}),
            refusals=(lambda node: "kernel too large" if node.args[1].meta["val"].shape[-1] > 5 else None,),
        ),
        Rule("fc", frozenset({aten.linear.default}), weight="weight"),
    )


@pytest.mark.parametrize("qat", [False, True])
def test_a_custom_quantizer_of_a_dozen_lines(qat):
    scheme = Scheme(weight=TensorScheme(symmetric=True))
    layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 7), nn.Flatten(), nn.Linear(256, 3))
    model = randomize_statistics(nn.Sequential(*layers)).eval()
    graph = graph_of(model)
    quantizer = AcceleratorQuantizer(scheme)
    assert {d.reason for d in quantizer.plan(graph).floating} == {"kernel too large", "no rule for flatten"}
    prepared = qf.calibrate(qf.prepare(graph, quantizer, qat=qat), [X], progress=False)
    converted = qf.convert(prepared)
    assert sum(b.dtype == torch.int8 for b in converted.buffers()) == 2
    assert torch.allclose(converted(X), model(X), atol=0.1 * float(model(X).abs().max()))


def test_scheme_round_trips_through_json_and_refuses_unknown_keys():
    scheme = Scheme(TensorScheme(dynamic=True), TensorScheme(bits=4, symmetric=True, per_channel=True))
    assert Scheme.from_json(scheme.to_json()) == scheme
    with pytest.raises(qf.QuantflowError, match="colour"):
        Scheme.from_json('{"weight": {"colour": 3}}')
    for bad in ({"bits": 16}, {"observer": "crystal_ball"}):
        with pytest.raises(qf.QuantflowError):
            TensorScheme(**bad)


def test_two_quantizers_do_not_share_state():
    graph = graph_of(ConvNet())
    first, second = XNNPACKQuantizer(skip=["head"]), XNNPACKQuantizer()
    assert len(first.plan(graph).integer) + 1 == len(second.plan(graph).integer)
    assert len(copy.deepcopy(first).plan(graph).integer) == len(first.plan(graph).integer)


def test_biases_of_layers_with_scales_of_another_kind_stay_exact():
    """A transposed convolution in groups has fewer scales than outputs."""
    from quantflow.graph.aten import aten

    rule = Rule("transposed", frozenset({aten.conv_transpose2d.input}), weight="weight", weight_axis=1)
    model, x = nn.ConvTranspose2d(4, 4, 3, groups=2).eval(), torch.randn(2, 4, 6, 6)
    prepared = qf.prepare(qf.export(model, (x,)).module(), RuleQuantizer(rules=(rule,)))
    converted = qf.convert(qf.calibrate(prepared, [x], progress=False))
    assert torch.equal(converted.get_parameter("bias"), model.bias)
    assert (converted(x) - model(x)).abs().max() < 0.2
