"""Operators on which a delegate's compiler fails are named and left out."""

import pytest
import torch
from edges import edge_of
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir.dialects._ops import ops

import quantflow as qf

X = torch.randn(2, 4, 8, 8)


def compiler_fails(monkeypatch, *operators):
    """The delegate's compiler raises, in words that name nothing, for a program that has all of these operators."""
    compiled = XnnpackBackend.preprocess

    def preprocess(edge_program, compile_specs):
        if set(operators) <= {node.target for node in edge_program.graph.nodes}:
            raise AssertionError("not compatible")
        return compiled(edge_program, compile_specs)

    monkeypatch.setattr(XnnpackBackend, "preprocess", staticmethod(preprocess))


@pytest.mark.parametrize(
    "operators", [[ops.edge.aten.tanh.default], [ops.edge.aten.tanh.default, ops.edge.aten.exp.default]]
)
def test_an_operator_on_which_the_compiler_of_the_delegate_fails_is_named_and_left_out(monkeypatch, operators):
    compiler_fails(monkeypatch, *operators)
    with pytest.warns(
        qf.QuantflowWarning, match=r"tanh.*the delegate's compiler fails: AssertionError: not compatible"
    ):
        edge = edge_of(lambda m, x: torch.tanh(torch.exp(m.conv(x))) * x, X)
    assert edge.delegation().portable == {"aten::tanh": 1}
    assert edge.to_executorch()(X).shape == X.shape


def test_layers_on_which_the_compiler_of_a_foreign_delegate_fails_are_named(monkeypatch):
    compiler_fails(monkeypatch, ops.edge.aten.tanh.default)
    with pytest.raises(qf.QuantflowError, match=r"conv .*tanh.*not compatible"):
        edge_of(lambda m, x: torch.tanh(m.conv(x)), X, delegate=XnnpackPartitioner())
