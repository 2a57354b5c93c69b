"""The operator at fault is found, and left out of the delegate."""

import pytest
import torch
from edges import edge_of
from executorch.exir.lowered_backend_module import LoweredBackendModule
from torch import nn

import quantflow as qf
from quantflow.delegates import lowered_modules
from quantflow.lowering.edge import lower_to_edge
from quantflow.lowering.fault_search import FaultSearch
from quantflow.metrics import signal_to_noise
from quantizers import XNNPACKQuantizer

X = torch.randn(2, 4, 8, 8)


@pytest.mark.parametrize("refused", ["aten_max_pool2d_default", "aten_hardswish_default", "aten_prelu_default"])
def test_what_the_delegate_keeps_whole_is_decomposed_where_it_is_left_out(refused):
    layers = nn.Hardswish(), nn.MaxPool2d(2), nn.PReLU(4), nn.Hardswish(), nn.MaxPool2d(2), nn.PReLU(4)
    model = nn.Sequential(nn.Conv2d(4, 4, 1), *layers).eval()
    core = qf.export(model, (X,)).to_core_aten()
    edge = lower_to_edge(core.program, core.source, "xnnpack", frozenset({refused}))
    assert signal_to_noise(model(X).detach(), edge.to_executorch()(X)) > 100


@pytest.mark.filterwarnings("ignore:.edge.*no delegate runs it")
def test_conversions_around_a_layer_that_is_left_out_are_done():
    """Whoever asks whether the delegate takes a layer tags them as a part of its kernel."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(3, 8)
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
    converted = qf.convert(qf.calibrate(prepared, [x], progress=False))
    core = qf.export(converted, (x,)).to_core_aten()
    for refused in ({"aten_linear_default"}, {"aten_linear_default", "aten_linear_default_1"}):
        program = lower_to_edge(core.program, core.source, "xnnpack", frozenset(refused)).to_executorch(check=False)
        assert signal_to_noise(converted(x).detach(), program(x)) > 60


@pytest.mark.parametrize("culprit", range(5))
def test_the_first_operator_with_which_a_program_goes_wrong_is_found(culprit):
    edge = edge_of(lambda m, x: torch.tanh(torch.exp(torch.sigmoid(m.conv(x)))) * x, X).manager.exported_program()
    inside = [node for _, nodes in lowered_modules(edge.graph_module) for node in nodes]
    assert len(inside) == 5
    search = FaultSearch()
    name = inside[culprit].name
    assert search.together(inside, lambda out: name not in out) == {name}
    assert search.together(inside, lambda out: True) == set()
    assert FaultSearch(seconds=-1.0).together(inside, lambda out: name not in out) == set()


def test_a_call_of_which_no_program_can_be_made_is_left_out_of_the_search(monkeypatch):
    edge = edge_of(lambda m, x: torch.tanh(m.conv(x)), X)

    def fails(self, *args, **kwargs):
        raise AssertionError("Number of inputs changed after transformation")

    monkeypatch.setattr(LoweredBackendModule, "buffer", fails)
    assert FaultSearch().alone(edge.manager.exported_program(), [X]) == set()
    assert FaultSearch().alone(edge.manager.exported_program(), None) == set()
