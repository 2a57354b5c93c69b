"""Networks that are cut into blocks, with the blocks that they should have."""

import warnings

import torch
from networks import Concatenated, ConvNet, NoGradInside, Residual, SharedConv, randomize_statistics
from torch import nn

import quantflow as qf
from quantflow.simulation.interpreter import Interpreter
from quantizers import W4A8, XNNPACKQuantizer


class Two(nn.Module):
    """Two inputs, one of them a mask of integers, and two outputs, one of them on the way."""

    def __init__(self):
        super().__init__()
        self.first, self.left, self.right, self.last = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, mask):
        x = self.first(x).relu()
        y = (self.left(x).relu() + self.right(x)) * mask
        return y, self.last(y.relu())


class Dense(nn.Module):
    """No place but the end that all passes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x):
        return self.c(torch.cat([self.b(self.a(x).relu()).relu(), x], 1)) + x


IMAGES, ROWS = torch.randn(32, 4, 6, 6).cumsum(2), torch.randn(128, 8) @ torch.randn(8, 8)
# name: (model, inputs, layers of its blocks by how many at least are together)
NETWORKS = {
    "chain": (
        nn.Sequential(*(m for _ in range(5) for m in (nn.Linear(8, 8), nn.ReLU()))),
        (ROWS,),
        {1: [1] * 5, 2: [2, 2, 1], 9: [5]},
    ),
    "residual": (
        nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), Residual(), nn.Conv2d(4, 2, 1)),
        (IMAGES,),
        {1: [1, 2, 1], 2: [3, 1]},
    ),
    "branches": (nn.Sequential(Concatenated(), nn.Conv2d(8, 2, 1)), (IMAGES,), {1: [2, 1, 1], 3: [3, 1]}),
    "skip without a layer": (ConvNet(), (IMAGES[:, :3],), {1: [1, 1, 1], 2: [2, 1]}),
    "two in, two out": (Two(), (ROWS, torch.randint(0, 2, (128, 8))), {1: [1, 2, 1], 2: [3, 1]}),
    "no cut": (Dense(), (IMAGES,), {1: [3]}),
    "a layer called twice": (
        nn.Sequential(nn.Conv2d(4, 4, 1), SharedConv(), nn.Conv2d(4, 2, 1)),
        (IMAGES,),
        {1: [1, 1], 2: [2]},
    ),
    "gradients switched off": (NoGradInside(), (ROWS[:, :6],), {1: [1, 1], 2: [2]}),
}
for model, _, _ in NETWORKS.values():
    randomize_statistics(model)


def calibrated(model, inputs, scheme=W4A8, sample=None):
    graph = qf.export(model.eval(), tuple(x[:2] for x in inputs), dynamic_batch=True).module()
    with warnings.catch_warnings(action="ignore", category=qf.QuantflowWarning):  # plans that leave something in float
        prepared = qf.prepare(graph, XNNPACKQuantizer(scheme))
    return qf.calibrate(prepared, [inputs], sample=sample, progress=False)


def values_of(graph, inputs, integers):
    found = {}
    for _, values in Interpreter(graph, quantize=bool(integers)).run(inputs):
        found |= values
    return found
