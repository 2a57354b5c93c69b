"""The network and the batches of the cases that several processes work on together."""

import copy
import functools

import torch
from torch import nn

import quantflow as qf
from quantizers import Scheme, TensorScheme, XNNPACKQuantizer


class Unsized:
    """Batches without a length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


class Small(nn.Module):
    """A convolution, batch norm and a head."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3)))


def batches(count, first=0):
    torch.manual_seed(1)
    x = torch.randn(40, 4, 3, 8, 8) * torch.linspace(1, 3, 40).reshape(-1, 1, 1, 1, 1)
    return [(x[i], torch.arange(4) % 5) for i in range(first, first + count)]


@functools.cache
def captured():
    torch.manual_seed(0)
    return qf.export(Small().eval(), (batches(1)[0][0],), dynamic_batch=True).module()


def prepared(observer="min_max", **options):
    graph = copy.deepcopy(captured())
    quantizer = options.pop("quantizer", None) or XNNPACKQuantizer(Scheme(TensorScheme(observer=observer)))
    return qf.prepare(graph, quantizer, **options)


def ranges(graph):
    names = ("min_val", "max_val", "scale", "zero_point", "count")
    return {k: v.tolist() for k, v in graph.state_dict().items() if k.rsplit(".", 1)[-1] in names}
