"""Networks that compute with their parameters alone, in part, for tests of constants."""

import torch
from torch import nn
from torch.nn import functional as F

import quantflow as qf


class StandardizedConv(nn.Conv2d):
    """A convolution with standardised weights, as NFNets have it."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.gain = nn.Parameter(torch.rand(self.out_channels) + 0.5)

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        flat = F.batch_norm(flat, None, None, self.gain, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, flat.reshape_as(self.weight), self.bias, self.stride, self.padding)


class JoinedBias(nn.Module):
    """A linear layer of which the bias is joined from parts, as BEiT has it."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 8))
        self.first, self.last = nn.Parameter(torch.randn(8)), nn.Parameter(torch.randn(8))

    def forward(self, x):
        return F.linear(x, self.weight, torch.cat([self.first, torch.zeros_like(self.last), self.last]))


class WrittenMask(nn.Module):
    """A mask that is written in place, as Swin has it."""

    def forward(self, x):
        mask = x.new_zeros(4, 4)
        mask[:2, 2:] = -1.0
        mask[2:, :2] = -1.0
        return x + mask


class Positions(nn.Module):
    """A table that is read at computed indices."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(7, 3))

    def forward(self, x):
        offsets = torch.arange(4)[:, None] - torch.arange(4)[None] + 3
        return x + self.table[offsets].permute(2, 0, 1).sigmoid() * 16


IMAGE, ROWS, GRID = (2, 3, 8, 8), (2, 8), (2, 3, 4, 4)
COMPUTED = {
    "standardised weight": (lambda: StandardizedConv(3, 8, 3), IMAGE),
    "weight norm": (lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3)), IMAGE),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), ROWS),
    "joined bias": (JoinedBias, ROWS),
    "written mask": (WrittenMask, GRID),
    "table of positions": (Positions, GRID),
}


def captured(make, shape):
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    return model, x, qf.export(model, (x,), dynamic_batch=True).module().eval()
