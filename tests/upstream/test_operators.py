import importlib

import pytest
import torch

from quantflow.upstream import operators
from quantflow.upstream.edge_operators import ops

ADD = torch.ops.aten.add_.Tensor
EDGE_ADD = ops.edge.aten.add.Tensor


def test_classes():
    assert isinstance(ADD, operators.OpOverload)
    assert isinstance(torch.ops.higher_order.cond, operators.HigherOrderOperator)
    assert isinstance(ADD, operators.OperatorBase)
    assert not isinstance(torch.add, operators.OperatorBase)


def test_a_schema_declares_arguments_and_results():
    schema = operators.schema_of(ADD)
    assert (schema.name, schema.is_mutable) == ("aten::add_", True)
    names = [(a.name, a.kwarg_only, a.has_default_value()) for a in schema.arguments]
    assert names == [("self", False, False), ("other", False, False), ("alpha", True, True)]
    assert schema.arguments[2].default_value == 1
    assert schema.arguments[0].alias_info.is_write
    assert schema.arguments[1].alias_info is None
    assert schema.returns[0].alias_info is not None


def test_an_edge_operator_has_the_schema_and_the_names_of_its_operator():
    assert operators.schema_of(EDGE_ADD).name == "aten::add"
    assert operators.packet_name(EDGE_ADD) == "add"
    assert operators.qualified_name(EDGE_ADD) == "aten::add.Tensor"


def test_names():
    assert operators.packet_name(ADD) == "add_"
    assert operators.overload_name(ADD) == "Tensor"
    assert operators.qualified_name(ADD) == "aten::add_.Tensor"
    assert operators.overload_name(torch.ops.aten.conv2d.default) == "default"


@pytest.mark.parametrize("target", [torch.add, len, "submodule", None], ids=["builtin", "function", "text", "none"])
def test_what_is_no_operator_has_no_schema_and_no_name(target):
    assert operators.schema_of(target) is None
    assert operators.packet_name(target) == operators.qualified_name(target) == ""


def test_the_module_of_builtins_can_be_imported():
    assert hasattr(importlib.import_module(operators.BUILTINS), "_set_grad_enabled")
