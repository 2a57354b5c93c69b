"""Windows that are folded into images, and attention that does."""

import pytest
import torch
from float_path import Function, same
from networks import sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf

IMAGE = torch.randn(2, 4, 7, 9)
FOLDS = {
    "overlapping": ({"kernel_size": 3, "padding": 1}, IMAGE),
    "strided with a rest": ({"kernel_size": (2, 3), "stride": 2}, IMAGE),
    "dilated": ({"kernel_size": 2, "dilation": 2, "padding": (1, 2), "stride": 3}, IMAGE),
    "without a batch": ({"kernel_size": 2}, IMAGE[0]),
}


@pytest.mark.parametrize("delegate", ["xnnpack", None])
@pytest.mark.parametrize("name", FOLDS)
def test_fold(name, delegate):
    sides, x = FOLDS[name]
    model = Function(lambda x: F.fold(F.unfold(x, **sides) * 2, x.shape[-2:], **sides))
    assert same(model, x, delegate=delegate)


class OutlookAttention(nn.Module):
    """As in VOLO: each place weighs the patch around it, and overlapping patches add up."""

    def __init__(self, channels=8, heads=2):
        super().__init__()
        self.heads, self.value, self.weights = heads, nn.Linear(channels, channels), nn.Linear(channels, heads * 81)
        self.pool, self.out = nn.AvgPool2d(2, 2, ceil_mode=True), nn.Linear(channels, channels)

    def forward(self, x):
        n, h, w, c = x.shape
        rows, columns = (h + 1) // 2, (w + 1) // 2
        value = F.unfold(self.value(x).permute(0, 3, 1, 2), 3, padding=1, stride=2)
        value = value.reshape(n, self.heads, c // self.heads, 9, rows * columns).permute(0, 1, 4, 3, 2)
        pooled = self.pool(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        weights = self.weights(pooled).reshape(n, rows * columns, self.heads, 9, 9).permute(0, 2, 1, 3, 4)
        mixed = (torch.softmax(weights, -1) @ value).permute(0, 1, 4, 3, 2).reshape(n, c * 9, rows * columns)
        return self.out(F.fold(mixed, (h, w), 3, padding=1, stride=2).permute(0, 2, 3, 1))


def test_outlook_attention():
    model, x = OutlookAttention().eval(), torch.randn(1, 6, 6, 8)
    assert same(model, x)
    result = qf.quantize(model, (x,), [x], progress=False, recover=False)
    assert sqnr(model(x), result.program(x)) > 20
