"""The whole flow in one call, and what it refuses or warns of."""

import pytest
import torch
from networks import ConvNet, randomize_statistics, sqnr
from torch import nn

import quantflow as qf
from quantizers import INT8, XNNPACKQuantizer

X = torch.randn(2, 3, 16, 16)


def test_quantize_is_all_verbs_in_one():
    model = randomize_statistics(ConvNet()).eval()
    result = qf.quantize(model, (X[:1],), [torch.randn(5, 3, 16, 16), torch.randn(3, 3, 16, 16)], progress=False)
    assert result.report.delegated_fraction == 1.0
    assert "int8" in str(result.report)
    assert sqnr(model(X[:1]).detach(), result.program(X[:1])) > 15
    assert set(result.report.seconds) == {"export", "prepare", "calibrate", "recover", "convert", "lower"}
    with pytest.raises(qf.QuantflowError, match="abacus"):
        qf.quantize(model, (X[:1],), [X], delegate="abacus")
    with pytest.raises(qf.QuantflowError, match="no way to recover"):
        qf.quantize(model, (X[:1],), [X], recover="everything")


def test_quantize_warns_of_what_stays_outside():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(torch.cumsum(x, 1))

    with pytest.warns(qf.QuantflowWarning, match="cumsum"):
        qf.quantize(
            Running(), (torch.randn(1, 8),), [torch.randn(4, 8)], quantizer=XNNPACKQuantizer(INT8), progress=False
        )


def test_a_batch_size_for_the_program_is_not_a_bool():
    with pytest.raises(qf.QuantflowError, match="8 is not a bool"):
        qf.quantize(nn.Linear(4, 4), (torch.randn(2, 4),), [torch.randn(2, 4)], dynamic_batch=8, progress=False)
