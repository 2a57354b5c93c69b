"""Preparing keeps the function of the network, however it is written."""

import pytest
import torch
from networks import Behind
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer

ODD = {
    "rsub with alpha": lambda y: torch.rsub(y, 1.0, alpha=2),
    "scalars": lambda y: y * (y.abs().mean() * 2.0),
    "mean of another dtype": lambda y: y.mean((2, 3), dtype=torch.float64),
    "integers clamped": lambda y: y * (y * 4).long().clamp(0.5, 3.5),
    "one tensor joined and written": lambda y: torch.cat([y]).add_(1) + y,
    "average over halves": lambda y: torch.nn.functional.avg_pool2d(y.half() * 0.5, 2).float(),
    "to": lambda y: Behind.forward(CONV, y.to(torch.float32)),
}
CONV = Behind(torch.relu)


@pytest.mark.filterwarnings("ignore:.plan.:quantflow.QuantflowWarning")  # of float that leaves the delegate
@pytest.mark.parametrize("name", ODD)
def test_preparing_keeps_odd_functions(name):
    model, x = Behind(ODD[name]).eval(), torch.randn(2, 4, 8, 8)
    model.aside, model.conv2 = nn.Parameter(torch.ones(1, dtype=torch.float64)), CONV
    expected = model(x)
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())(x)
    assert prepared.dtype == expected.dtype
    assert prepared.shape == expected.shape
    assert torch.allclose(prepared, expected, atol=1e-4)
