"""Graphs that the stock tools prepared or captured convert to inference, and export."""

import torch
from flow import lower
from networks import ConvNet, randomize_statistics, sqnr
from torch import nn

import quantflow as qf
from quantizers import XNNPACKQuantizer


def test_a_stock_graph_captured_in_training_mode_converts_to_inference():
    model = randomize_statistics(ConvNet())
    stock = torch.export.export(model.train(), (torch.randn(4, 3, 16, 16),)).module()
    x = torch.randn(4, 3, 16, 16)
    converted = qf.convert(qf.calibrate(qf.prepare(stock, XNNPACKQuantizer()), [x], progress=False))
    assert torch.equal(converted(x), converted(x))
    assert sqnr(model.eval()(x), converted(x)) > 20


def test_a_graph_of_stock_prepare_is_exported_after_convert():
    """Stock prepare registers the observer of a shared grid under two names."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.last(self.first(x).transpose(1, 2).transpose(1, 2))

    model, x = Turned().eval(), torch.randn(2, 4, 8)
    prepared = prepare_pt2e(torch.export.export(model, (x,)).module(), XNNPACKQuantizer())
    prepared(x)
    converted = qf.convert(prepared)
    assert sqnr(converted(x), lower(converted, x)(x)) > 60
