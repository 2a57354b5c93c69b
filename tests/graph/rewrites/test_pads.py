"""Pads that cut off, in float and in integers."""

import pytest
import torch
from float_path import Function, same
from networks import sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf

IMAGE = torch.randn(2, 4, 7, 9)
PADS = {
    "cut on all sides": (-1, -1, -1, -1),
    "cut and padded": (-2, 1, 3, -1),
    "cut at one end": (0, -2),
    "of the batch": (0, 0, 0, 0, -1, 1, 0, 1),
}


@pytest.mark.parametrize("delegate", ["xnnpack", None])
@pytest.mark.parametrize("name", PADS)
def test_pads_that_cut_off(name, delegate):
    assert same(Function(lambda x: F.pad(x, PADS[name], value=0.5) * 2), IMAGE, delegate=delegate)


def test_pads_that_cut_off_in_integers():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ZeroPad2d((-1, -1, 2, -1)), nn.Conv2d(4, 4, 1)).eval()
    result = qf.quantize(model, (IMAGE,), [IMAGE], progress=False)
    assert result.program.delegation.calls == 1
    assert sqnr(model(IMAGE), result.program(IMAGE)) > 25
