"""A parameter that the program writes is state."""

import copy

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.metrics import signal_to_noise as sqnr
from quantizers import XNNPACKQuantizer

CALLS = [torch.randn(4, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]


class Steps(nn.Module):
    """Writes a parameter."""

    def __init__(self):
        super().__init__()
        self.step, self.linear = nn.Parameter(torch.full((8,), 0.5)), nn.Linear(8, 8)

    def forward(self, x):
        with torch.no_grad():
            self.step.mul_(2)
        return self.linear(x) + self.step


@pytest.mark.filterwarnings("ignore:.*left to portable kernels:quantflow.QuantflowWarning")
def test_a_parameter_that_is_written_is_state():
    model = Steps().eval()
    exported = qf.export(model, (CALLS[0],))
    prepared = qf.calibrate(qf.prepare(exported.module(), XNNPACKQuantizer()), CALLS, progress=False)
    assert torch.equal(prepared.step, model.step)
    before = exported.program.graph_signature
    program = qf.quantize(model, (CALLS[0],), CALLS, progress=False, recover=False).program
    for x, expected in zip(CALLS, map(copy.deepcopy(model), CALLS), strict=True):
        assert sqnr(expected.detach(), program(x)) > 30
    program = exported.to_core_aten().to_edge("xnnpack").to_executorch()
    assert exported.program.graph_signature == before
    for x in CALLS:
        assert torch.allclose(program(x), model(x), atol=1e-5)
