"""Faults of a delegate's compiler in several calls of it, and scalars that it can't quantize."""

import pytest
import torch
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.dialects._ops import ops
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer

pytestmark = pytest.mark.slow

X = torch.randn(2, 4, 8, 8)


class TwoCalls(nn.Module):
    """The cumulative sum runs outside the delegate, between two calls of it."""

    def forward(self, x):
        x = torch.cumsum(torch.tanh(x) * torch.exp(x), 1)
        return torch.tanh(x) * torch.exp(x)


def test_an_operator_that_fails_beside_others_is_found_in_each_call_of_the_delegate(monkeypatch):
    compiled = XnnpackBackend.preprocess

    def preprocess(edge_program, compile_specs):
        if {ops.edge.aten.tanh.default, ops.edge.aten.exp.default} <= {n.target for n in edge_program.graph.nodes}:
            raise AssertionError("not compatible")
        return compiled(edge_program, compile_specs)

    monkeypatch.setattr(XnnpackBackend, "preprocess", staticmethod(preprocess))
    with pytest.warns(qf.QuantflowWarning, match="compiler fails: AssertionError: not compatible"):
        edge = qf.export(TwoCalls(), (X,)).to_core_aten().to_edge("xnnpack")
    outside = edge.delegation().portable
    assert outside["aten::exp"] + outside["aten::tanh"] == 2
    torch.testing.assert_close(edge.to_executorch()(X), TwoCalls()(X), rtol=1e-4, atol=1e-4)


def rounded(x, scale=0.05):
    quantized = torch.ops.quantized_decomposed.quantize_per_tensor(x, scale, 0, -128, 127, torch.int8)
    return torch.ops.quantized_decomposed.dequantize_per_tensor(quantized, scale, 0, -128, 127, torch.int8)


class Scalar(nn.Module):
    def forward(self, x):
        return rounded(rounded(x) + rounded(x.mean()), 0.1)


class Centered(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return self.conv(x - x.mean())


@pytest.mark.filterwarnings("ignore:.edge.*no delegate runs it")
def test_a_scalar_is_quantized_outside_the_delegate():
    program = qf.export(Scalar(), (X,)).to_core_aten().to_edge("xnnpack").to_executorch()
    torch.testing.assert_close(program(X), Scalar()(X), rtol=0, atol=0.11)
    assert program.delegation.calls >= 1


def test_an_operand_without_dimensions_stays_in_float():
    graph = qf.export(Centered().eval(), (X,)).module()
    (difference,) = (d for d in XNNPACKQuantizer().plan(graph).decisions if "sub" in str(d.node))
    assert difference.scheme is None
    assert "has no dimension" in difference.reason
