"""Images of five classes, a loader and a graph, for tests of training."""

import torch
from networks import ConvNet
from torch.utils.data import DataLoader, TensorDataset

import quantflow as qf
from quantizers import XNNPACKQuantizer

SEEDED = torch.Generator().manual_seed(0)  # whichever test file imports this first
Y = torch.arange(32) % 5
X = torch.randn(32, 3, 16, 16, generator=SEEDED) + torch.randn(5, 3, 1, 1, generator=SEEDED)[Y]


def loader():
    return DataLoader(TensorDataset(X, Y), 8)


def graph(*, qat=True):
    captured = qf.export(ConvNet(p=0.0), (X[:2],), dynamic_batch=True).module()
    return qf.prepare(captured, XNNPACKQuantizer(), qat=True) if qat else captured
