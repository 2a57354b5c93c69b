"""State that is written by a name of which no schema says so: views that operators may give back, and bodies of regions."""

import copy

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.metrics import signal_to_noise as sqnr
from quantizers import XNNPACKQuantizer

CALLS = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Accumulates(nn.Module):
    """Adds to a buffer by another name of it."""

    def __init__(self, name):
        super().__init__()
        torch.manual_seed(0)
        self.name, self.linear, self.last = name, nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("state", torch.zeros(4, 8))

    def forward(self, x):
        self.name(self.state, x).add_(self.linear(x))
        return self.last(self.state)


class InRegions(nn.Module):
    """Counts its calls in regions; the one under an autocast that is on stays a region."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("state", torch.zeros(4, 8))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            self.state.add_(self.linear(x))
        with torch.autocast("cpu", torch.bfloat16):
            self.calls.view(1).add_(1)
        return self.linear(self.state) / self.calls


def test_state_that_is_written_in_regions_is_left():
    model = InRegions().eval()
    graph = qf.export(model, (CALLS[0],)).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), CALLS, progress=False)
    assert prepared.calls == 0
    assert not prepared.state.any()
    converted, eager = qf.convert(prepared), copy.deepcopy(model)
    for x in CALLS:
        expected = eager(x)
        assert torch.allclose(graph(x), expected, atol=1e-5)
        assert sqnr(expected.detach(), converted(x).detach()) > 30


NAMES = {
    "type_as": lambda state, x: state.type_as(x),
    "atleast_2d": lambda state, x: torch.atleast_2d(state),
    "atleast_3d of several": lambda state, x: torch.atleast_3d(x, state)[1].squeeze(-1),
    "broadcast_tensors": lambda state, x: torch.broadcast_tensors(x, state)[1],
    "meshgrid": lambda state, x: torch.meshgrid(state[0], x[0], indexing="ij")[0][:, 0].view(1, 8),
    "einsum": lambda state, x: torch.einsum("ij->ji", state).t(),
    "sum_to_size": lambda state, x: state.sum_to_size(4, 8),
    "conj_physical": lambda state, x: torch.conj_physical(state),
    "unsafe_chunk": lambda state, x: torch.unsafe_chunk(state, 2)[0],
    "to": lambda state, x: state.to(x),
}


@pytest.mark.parametrize("name", NAMES)
def test_state_that_is_written_by_another_name_is_left_and_stays_float(name):
    model = Accumulates(NAMES[name]).eval()
    if name in ("meshgrid", "unsafe_chunk"):
        model.linear = nn.Sequential(model.linear, Row(1 if name == "meshgrid" else 2))
    graph = qf.export(model, (CALLS[0],)).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer())
    qf.calibrate(prepared, CALLS, progress=False)
    assert torch.equal(prepared.state, torch.zeros(4, 8))
    converted, eager = qf.convert(prepared), copy.deepcopy(model)
    for x in CALLS:
        expected = eager(x)
        assert torch.allclose(graph(x), expected, atol=1e-5)
        assert sqnr(expected.detach(), converted(x).detach()) > 30


@pytest.mark.filterwarnings("ignore:.*left to portable kernels:quantflow.QuantflowWarning")
@pytest.mark.parametrize("name", ["type_as", "broadcast_tensors"])
def test_state_that_is_written_by_another_name_is_written_on_the_runtime(name):
    model = Accumulates(NAMES[name]).eval()
    program = qf.export(model, (CALLS[0],)).to_core_aten().to_edge("xnnpack").to_executorch()
    for x in CALLS:
        assert torch.allclose(program(x), model(x), atol=1e-5)


class Row(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, x):
        return x[: self.rows]
