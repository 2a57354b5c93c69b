import logging

import pytest
import torch
import torch._export.utils as export_utils
from torch import nn
from torch.export import exported_program

from quantflow.upstream import versions
from quantflow.upstream.decomposition import fast_decomposition


def program():
    model = nn.Sequential(nn.Linear(3, 3), nn.GELU(), nn.Hardswish()).eval()
    return torch.export.export(model, (torch.zeros(2, 3),))


def targets(decomposed):
    return [str(node.target) for node in decomposed.graph.nodes]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (export_utils, "_materialize_cpp_cia_ops"),
        (export_utils, "_collect_all_valid_cia_ops_for_namespace"),
        (torch._ops.OperatorBase, "py_impl"),
        (exported_program, "autograd_not_implemented"),
    ],
)
def test_the_names_are_replaced_and_come_back(owner, name, monkeypatch):
    monkeypatch.delenv(versions.SWITCH, raising=False)
    monkeypatch.setattr(versions, "supported", lambda: True)
    stock = getattr(owner, name)
    with fast_decomposition():
        assert getattr(owner, name) is not stock
    assert getattr(owner, name) is stock


def test_an_operator_has_tables_of_kernels():
    operator = torch.ops.aten.add.Tensor
    assert isinstance(operator.py_kernels, dict)
    assert callable(operator._dispatch_cache.clear)
    assert isinstance(torch._C.DispatchKey.Python, torch._C.DispatchKey)


def test_the_graph_is_the_same():
    stock = program().run_decompositions()
    with fast_decomposition():
        fast = program().run_decompositions()
    assert targets(fast) == targets(stock)
    x = torch.randn(2, 3)
    assert fast.module()(x).shape == stock.module()(x).shape


def test_without_a_name_torchs_own_functions_run(monkeypatch, caplog):
    monkeypatch.delenv(versions.SWITCH, raising=False)
    monkeypatch.setattr(versions, "supported", lambda: True)
    monkeypatch.delattr(exported_program, "autograd_not_implemented")
    stock = export_utils._materialize_cpp_cia_ops
    with caplog.at_level(logging.INFO, "quantflow"), fast_decomposition():
        assert export_utils._materialize_cpp_cia_ops is stock
    assert "autograd_not_implemented" in caplog.text


def test_the_switch(monkeypatch, caplog):
    monkeypatch.setenv(versions.SWITCH, "0")
    stock = torch._ops.OperatorBase.py_impl
    with caplog.at_level(logging.INFO, "quantflow"), fast_decomposition():
        assert torch._ops.OperatorBase.py_impl is stock
    assert "QUANTFLOW_FAST_LOWERING=0" in caplog.text
