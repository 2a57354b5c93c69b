import importlib
from types import SimpleNamespace

import torch
from torch import nn

from quantflow.upstream.fake_tensors import FakeTensorMode
from quantflow.upstream.lowering.delegates import delegates_by_values
from quantflow.upstream.replaced import exclusively

CALLS = importlib.import_module("torch._higher_order_ops.executorch_call_delegate")


def lowered():
    """What executorch makes of a subgraph, as far as it is read: the program of the subgraph."""
    program = torch.export.export(nn.Linear(3, 2), (torch.zeros(4, 3),))
    program.graph_module.forward = None  # a trace would call it
    return SimpleNamespace(original_module=program)


def test_fake_tensors_of_the_same_shape_are_not_traced():
    delegate, mode = lowered(), FakeTensorMode()
    with mode:
        x = torch.empty(4, 3)
    with exclusively(), delegates_by_values():
        y = CALLS.call_delegate_cpu(delegate, x)
    assert y.shape == (4, 2)
    assert y.fake_mode is mode


def test_other_inputs_are_traced(monkeypatch):
    monkeypatch.setattr(CALLS, "call_delegate_cpu", lambda lowered, *args: "traced")
    with FakeTensorMode():
        other = torch.empty(5, 3)
    with exclusively(), delegates_by_values():
        assert CALLS.call_delegate_cpu(lowered(), other) == "traced"
        assert CALLS.call_delegate_cpu(lowered(), torch.zeros(4, 3)) == "traced"
    assert CALLS.call_delegate_cpu(None) == "traced"


def test_the_operator_traces_by_that_name():
    assert "call_delegate_cpu" in CALLS.trace_call_delegate.__code__.co_names
