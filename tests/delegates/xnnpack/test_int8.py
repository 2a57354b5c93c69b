"""What the delegate would refuse or compute wrongly ends in a right program or a named error."""

import pytest
import torch
from executorch.backends.xnnpack.partition.config import generic_node_configs as generic
from graph_hazards import HAZARDS, Function, fake
from torch.ao.quantization.fx import _decomposed  # noqa: F401

import quantflow as qf
from quantflow.delegates.xnnpack import int8
from quantflow.metrics import signal_to_noise


@pytest.mark.parametrize("name", HAZARDS)
def test_runs_right(name):
    torch.manual_seed(0)
    model, x = Function(HAZARDS[name]), torch.randn(2, 4, 4, 4)
    program = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert signal_to_noise(model(x), program(x)) > 25


@pytest.fixture
def careless(monkeypatch):
    """A partitioner that admits softmax in int8, which the delegate does not load."""

    class Softmax(int8._Integer, generic.SoftmaxConfig):
        pass

    kept = (c for c in int8.CONFIGS if c.target_name != Softmax.target_name)
    monkeypatch.setattr(int8, "CONFIGS", (*kept, Softmax))


def test_a_refused_node_is_named_and_left_out(careless):
    def function(m, x):
        return fake(torch.tanh(fake(torch.softmax(fake(torch.sigmoid(fake(x)), 1 / 256, -128), -1), 1 / 256, -128)))

    model, x = Function(function), torch.randn(2, 4, 4, 4)
    edge = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack")
    with pytest.warns(qf.QuantflowWarning, match="softmax"):
        program = edge.to_executorch()
    assert list(program.delegation.portable) == ["aten::_softmax"]
    assert program.delegation.calls == 2
    assert signal_to_noise(model(x), program(x)) > 30
    with pytest.raises(qf.QuantflowError, match="softmax"):
        edge.to_executorch(strict=True)
