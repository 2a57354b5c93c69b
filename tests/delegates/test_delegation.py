"""Who runs what: the counts of a partitioned program."""

import torch
from torch import nn

import quantflow as qf
from quantizers import DYNAMIC_INT8, XNNPACKQuantizer


def delegation_of(model, x, quantizer):
    graph = qf.prepare(qf.export(model.eval(), (x,)).module(), quantizer)
    converted = qf.convert(qf.calibrate(graph, [x], progress=False))
    return qf.export(converted, (x,)).to_core_aten().to_edge("xnnpack").delegation()


class WithToken(nn.Module):
    """Joins a float input to what a convolution computes."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(torch.cat([self.conv(x), torch.fmod(x[:, :1], 2.0).expand(-1, 4, -1, -1)], 2))


def test_what_reads_a_float_input_of_a_call_is_float():
    delegation = delegation_of(WithToken(), torch.randn(2, 3, 6, 6), XNNPACKQuantizer(skip=[lambda n: n.name == "cat"]))
    assert delegation.calls == 2
    assert delegation.floating["aten::cat"] == 1


def test_dynamic_linear_layers_are_integers_and_finding_a_range_is_no_operator():
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 8))
    delegation = delegation_of(model, torch.randn(5, 32), XNNPACKQuantizer(DYNAMIC_INT8))
    assert delegation.floating == {"aten::tanh": 1}
