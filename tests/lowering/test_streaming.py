"""Fifty calls in a row of networks with caches and recurrent state: the program does what its graph does."""

import copy

import pytest
import torch
from streaming import NETWORKS

import quantflow as qf
from quantflow.metrics import signal_to_noise as sqnr
from quantizers import DYNAMIC_INT8, DYNAMIC_W4, INT8, XNNPACKQuantizer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*:quantflow.QuantflowWarning")]

CALLS = 50
CASES = [
    *(("decoder by index_copy_", scheme) for scheme in (None, INT8, DYNAMIC_INT8, DYNAMIC_W4)),
    *(("LSTM detector", scheme) for scheme in (None, INT8, DYNAMIC_INT8, DYNAMIC_W4)),
    ("decoder by assignment", INT8),
    ("decoder, functional", DYNAMIC_INT8),
    ("GRU detector", INT8),
]


def called(network, calls):
    with torch.no_grad():
        return torch.stack([network(*call).clone() for call in calls])


@pytest.mark.parametrize(("name", "scheme"), CASES, ids=str)
def test_a_program_does_for_fifty_calls_what_its_graph_does(name, scheme):
    torch.manual_seed(0)
    make, data = NETWORKS[name]
    model, calls = make().eval(), data(CALLS)
    graph = qf.export(copy.deepcopy(model), calls[0]).module().eval()
    if scheme is not None:
        others = [qf.CallSequence(data(CALLS, seed)) for seed in (1, 2)]
        graph = qf.convert(qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(scheme)), others, progress=False))
    program = qf.export(copy.deepcopy(graph), calls[0]).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    expected, ours, found = (called(network, calls) for network in (model, graph, program))
    against_graph = sqnr(expected, ours)
    assert against_graph > (15 if scheme is DYNAMIC_W4 else 20)
    assert sqnr(expected, found) > min(against_graph, 80) - 1
    program.reset()
    assert torch.equal(called(program, calls), found)
