"""Functions lowered to the edge dialect, for tests of the check on the runtime."""

from torch import nn

import quantflow as qf


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function, self.conv = function, nn.Conv2d(4, 4, 1)

    def forward(self, *x):
        return self.function(self, *x)


def edge_of(function, *x, delegate="xnnpack"):
    return qf.export(Function(function), x).to_core_aten().to_edge(delegate)
