"""Tensors that share an observer, and those that are read on grids of their own."""

import pytest
import torch
from flow import lower, quantize
from networks import sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantizers import DYNAMIC_INT8, XNNPACKQuantizer

IMAGE = torch.randn(2, 3, 8, 8)


class CatAfterDropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        z, d = self.b(x), F.dropout(self.a(x) * 3, 0.1, self.training)
        return torch.cat([z, d], 1), self.c(d)


def test_concatenation_behind_dropout_shares_one_grid_and_loads():
    converted = quantize(CatAfterDropout(), IMAGE)
    for ours, expected in zip(lower(converted, IMAGE)(IMAGE), converted(IMAGE), strict=True):
        assert sqnr(expected, ours) > 30


class Keys(nn.Module):
    """A layer that reads a tensor in integers whose range is chosen at run time, beside one that reads it otherwise."""

    def __init__(self, beside):
        super().__init__()
        self.keys, self.queries, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.drop, self.beside = nn.Dropout(0.1), beside

    def forward(self, x):
        return self.beside(self, x, self.drop(self.keys(x)))


@pytest.mark.parametrize(
    "beside",
    [lambda m, x, k: (torch.bmm(m.queries(x), k.mT), m.out(k)), lambda m, x, k: (m.queries(k), m.out(k))],
    ids=["a centred grid", "a grid fixed ahead"],
)
def test_a_dynamic_layer_reads_what_others_read_on_grids_of_their_own(beside):
    model, x = Keys(beside).eval(), torch.randn(2, 4, 8)
    quantizer = XNNPACKQuantizer(overrides={"out": DYNAMIC_INT8})
    graph = qf.export(model, (x,)).module()
    converted = qf.convert(qf.calibrate(qf.prepare(graph, quantizer), [x], progress=False))
    for found, expected in zip(lower(converted, x)(x), model(x), strict=True):
        assert sqnr(expected.detach(), found) > 30
