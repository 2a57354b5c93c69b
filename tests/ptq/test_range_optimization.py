"""Ranges spend no levels on what no output depends on."""

import pytest
import torch
from calibrated import calibrated
from torch import nn

from quantflow.observers.observation import observers_of
from quantflow.ptq import optimize_ranges
from quantflow.simulation.output_gradients import output_gradients
from quantizers import XNNPACKQuantizer


class Capped(nn.Module):
    """Outputs that depend on the activation up to ``cap`` only, but for ``leak`` of it."""

    def __init__(self, leak):
        super().__init__()
        self.linear, self.head, self.leak = nn.Linear(8, 8), nn.Linear(8, 4), leak

    def forward(self, x):
        y = self.linear(x)
        return self.head(y.clamp(-1, 1) + self.leak * y)


@pytest.mark.parametrize("leak", [0.0, 1.0])
def test_a_range_spends_no_levels_on_what_no_output_depends_on(leak):
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    x[::8] *= 12
    quantizer = XNNPACKQuantizer(skip=[lambda node: "clamp" in node.name or "add" in node.name or "mul" in node.name])
    graph = calibrated(Capped(leak), (x,), [x], quantizer)
    name, observer = next((n, o) for n, o in observers_of(graph).items() if n.endswith("linear"))
    found = observers_of(optimize_ranges(graph, output_gradients(graph, [(x,)], progress=False)))[name]
    width = float(found.scale) * 255
    full = float(observer.max_val - observer.min_val)
    assert width < full / 4 if leak == 0 else width > full / 2
