"""Regions of a graph: what their bodies hold survives."""

import torch
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        return torch.cond(x.sum() > 0, lambda y: y + torch.ones(4), lambda y: y - 1, (y,))


def test_constants_inside_branches_survive():
    x = torch.rand(2, 4)
    model = Branches().eval()
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
    assert torch.allclose(prepared(x), model(x), atol=1e-6)
