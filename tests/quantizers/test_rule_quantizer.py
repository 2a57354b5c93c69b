"""A quantizer of one table of rules: one of a dozen lines, and none shares state."""

import copy

import pytest
import torch
from networks import ConvNet, randomize_statistics
from torch import nn

import quantflow as qf
from quantflow.graph.aten import aten
from quantizers import Rule, RuleQuantizer, Scheme, TensorScheme, XNNPACKQuantizer

X = torch.randn(4, 3, 16, 16)


def graph_of(model, x=X):
    return qf.export(model, (x,)).module().eval()


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
