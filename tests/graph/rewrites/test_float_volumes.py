"""Operators over volumes on the float path, with and without a delegate."""

import copy

import pytest
import torch
from float_path import lowered, same
from networks import randomize_statistics
from torch import nn
from torch.nn import functional as F

VOLUME = torch.randn(2, 4, 5, 6, 7)


class SharedVolumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(torch.relu(self.conv(x)))


class ComputedWeight(nn.Module):
    """A standardised weight, as networks without norms have."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4, 2, 3, 3))

    def forward(self, x, scale):
        return F.conv3d(x, self.weight * scale)


VOLUMES = {
    "shared weight": (SharedVolumes(), VOLUME),
    "computed weight": (ComputedWeight(), VOLUME, torch.rand(6, 1, 1, 1, 1)),
    "without a batch": (nn.Conv3d(4, 6, (2, 3, 3), padding="same"), VOLUME[0]),
    "norm and clamp": (nn.Sequential(nn.Conv3d(4, 6, 3), nn.BatchNorm3d(6), nn.ReLU()), VOLUME),
    "transposed": (nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1, output_padding=1), VOLUME),
    "transposed in groups": (
        nn.ConvTranspose3d(4, 6, (3, 2, 3), stride=(3, 1, 2), groups=2, dilation=(2, 1, 1)),
        VOLUME,
    ),
    "transposed, cut": (nn.ConvTranspose3d(4, 3, (2, 3, 1), padding=(2, 1, 0)), VOLUME),
    "transposed without a batch": (nn.ConvTranspose3d(4, 6, 2, bias=False), VOLUME[0]),
    "average": (nn.AvgPool3d(2, ceil_mode=True), VOLUME),
    "average of what is there": (nn.AvgPool3d(3, 2, 1, ceil_mode=True, count_include_pad=False), VOLUME),
    "average, divided otherwise": (nn.AvgPool3d((3, 2, 1), divisor_override=5), VOLUME),
    "adaptive average": (nn.AdaptiveAvgPool3d((3, None, 4)), VOLUME),
    "global average": (nn.AdaptiveAvgPool3d(1), VOLUME),
    "maximum": (nn.MaxPool3d(3, 2, 1, ceil_mode=True), VOLUME),
    "maximum and its place": (nn.MaxPool3d(2, 2, 1, dilation=2, return_indices=True), VOLUME),
    "adaptive maximum": (nn.AdaptiveMaxPool3d((2, 3, 7)), VOLUME),
    "adaptive maximum and its place": (nn.AdaptiveMaxPool3d((2, 3, 4), return_indices=True), VOLUME),
}


@pytest.mark.parametrize("name", VOLUMES)
def test_volumes(name):
    model, *x = VOLUMES[name]
    assert same(copy.deepcopy(randomize_statistics(model)), *x)


@pytest.mark.parametrize("name", ["transposed", "average of what is there", "adaptive maximum"])
def test_volumes_without_a_delegate_and_of_any_batch(name):
    model, x = VOLUMES[name]
    program = lowered(model, x, delegate=None, dynamic_batch=6)
    for batch in (x, torch.randn(5, *x.shape[1:])):
        assert torch.allclose(program(batch), model(batch), rtol=1e-4, atol=1e-5)
