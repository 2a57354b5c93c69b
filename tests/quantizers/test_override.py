"""Overrides: layers that are skipped or quantized otherwise; the later one wins."""

import pytest
import torch
from networks import ConvNet, randomize_statistics
from torch import nn

import quantflow as qf
from quantflow.graph.aten import aten
from quantizers import DYNAMIC_INT8, INT8, Scheme, TensorScheme, XNNPACKQuantizer

X = torch.randn(4, 3, 16, 16)


def graph_of(model, x=X):
    return qf.export(model, (x,)).module().eval()


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
