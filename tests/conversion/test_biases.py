"""Biases are rounded as devices do, those of dead channels too."""

import pytest
import torch
from flow import lower, quantize
from networks import sqnr
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer


def test_bias_of_a_dead_channel_fits_int32():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval()
    with torch.no_grad():
        model[0].weight[1].zero_()
        model[0].bias[1] = 50.0
    x = torch.rand(2, 3, 5, 5) * 1e-2
    prepared = qf.calibrate(qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer()), [x], progress=False)
    input_scale = float(next(iter(prepared.quantization.children())).calculate_qparams()[0])
    converted = qf.convert(prepared)
    scale = converted.get_buffer("0.weight_scale")
    assert (torch.tensor([50.0]) / (input_scale * scale[1]) <= 2**31).all()


IMAGE = torch.randn(2, 3, 8, 8)


@pytest.mark.parametrize("gamma", [0.0, 1e-9])
@pytest.mark.parametrize("qat", [False, True])
def test_dead_channels_keep_their_bias_on_the_device(gamma, qat):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    with torch.no_grad():
        model[1].weight[1], model[1].bias[1] = gamma, 2.0
    converted = quantize(model, IMAGE, qat=qat)
    expected = converted(IMAGE)
    assert torch.allclose(expected[:, 1], torch.tensor(2.0), atol=0.05)
    assert sqnr(expected, lower(converted, IMAGE)(IMAGE)) > 35
