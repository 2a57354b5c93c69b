"""Convolutions over rows on the float path, between integers too."""

import pytest
import torch
from float_path import lowered, same
from networks import sqnr
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer

ROWS = {
    "plain": lambda: nn.Conv1d(6, 6, 3, padding="same"),
    "transposed": lambda: nn.ConvTranspose1d(6, 6, 3, stride=2, padding=1, groups=2),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_float_convolution_over_rows_between_integers(name):
    model, x = nn.Sequential(nn.Conv1d(4, 6, 3), ROWS[name](), nn.Conv1d(6, 4, 1)).eval(), torch.randn(2, 4, 12)
    graph = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer(skip=["1"]))
    converted = qf.convert(qf.calibrate(graph, [x], progress=False))
    program = lowered(converted, x)
    assert program.delegation.fraction == 1.0
    assert sqnr(converted(x), program(x)) > 35


def test_a_float_convolution_over_rows_before_integers():
    model, x = nn.Sequential(nn.Conv1d(5, 5, 1, groups=5), nn.SiLU(), nn.Conv1d(5, 8, 3)).eval(), torch.randn(2, 5, 6)
    quantizer = XNNPACKQuantizer(skip=["0"])
    prepared = qf.prepare(qf.export(model, (x,)).module(), quantizer)
    converted = qf.convert(qf.calibrate(prepared, [x], progress=False))
    program = lowered(converted, x)
    assert sqnr(converted(x), program(x)) > 35


class Recurrent(nn.Module):
    """One convolution over rows, called twice."""

    def __init__(self, convolution):
        super().__init__()
        self.convolution = convolution

    def forward(self, x):
        return self.convolution(torch.erf(self.convolution(x)) + x)


@pytest.mark.parametrize("convolution", [nn.Conv1d(8, 8, 3, padding="same"), nn.ConvTranspose1d(8, 8, 3, padding=1)])
def test_a_convolution_over_rows_that_is_called_twice(convolution):
    same(Recurrent(convolution).eval(), torch.randn(2, 8, 5))


@pytest.mark.parametrize("qat", [False, True], ids=["ptq", "qat"])
def test_a_convolution_over_rows_that_is_called_twice_in_integers(qat):
    model, x = nn.Sequential(*[nn.Conv1d(8, 8, 3, padding=1)] * 2).eval(), torch.randn(2, 8, 5)
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer(), qat=qat).eval()
    converted = qf.convert(qf.calibrate(prepared, [x], progress=False))
    program = lowered(converted, x)
    assert program.delegation.fraction == 1.0
    assert sqnr(converted(x), program(x)) > 35
