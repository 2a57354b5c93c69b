"""Tensors that are written in place: integers only where the write does not change a copy."""

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import XNNPACKQuantizer as Stock
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import get_symmetric_quantization_config
from networks import CountsCalls, sqnr
from stateful import CALLS, MAKE, lower, prepare
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e

import quantflow as qf
from quantflow.metrics import signal_to_noise
from quantizers import INT8, XNNPACKQuantizer

IMAGE = torch.randn(2, 3, 8, 8)


class WritesAPart(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x):
        y = self.a(x)
        y[:, 0] = 0
        return self.b(y)


def test_a_tensor_that_is_written_in_part_stays_float():
    model = WritesAPart().eval()
    graph = qf.export(model, (IMAGE,)).module()
    quantizer = XNNPACKQuantizer()
    assert [(d.node.name, d.reason) for d in quantizer.plan(graph).floating if d.rule is not None] == [
        ("conv2d", "it is written in place, or writes, where others see it")
    ]
    prepared = qf.calibrate(qf.prepare(graph, quantizer), [IMAGE], progress=False)
    assert sqnr(model(IMAGE).detach(), qf.convert(prepared)(IMAGE).detach()) > 30


def test_a_write_into_a_buffer_stays_one():
    model, x = CountsCalls().eval(), torch.randn(2, 4, 8, 8)
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
    assert torch.allclose(prepared(x) + 1, prepared(x), atol=1e-5)


def test_integers_that_another_quantizer_asks_for_state_are_refused_by_name():
    quantizer = Stock().set_global(get_symmetric_quantization_config())
    model = MAKE["numbers"]().eval()
    with pytest.raises(qf.QuantflowError, match=r"\[prepare\] (mul|add|clamp)_: .*writes into"):
        qf.prepare(qf.export(model, (CALLS[0],)).module(), quantizer)
    prepared = prepare_pt2e(torch.export.export(model, (CALLS[0],)).module(), quantizer)
    qf.calibrate(prepared, CALLS, progress=False)
    with pytest.raises(qf.QuantflowError, match=r"\[convert\] (mul|add|clamp)_: .*writes into"):
        qf.convert(prepared)


class OlderView(nn.Module):
    """A part of a tensor, read by its older name once the tensor was written."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(4, 4)

    def forward(self, x):
        y = self.first(x)
        part = y[..., :4]
        before = self.last(part)
        y.mul_(-2.0)
        return self.last(part) + before


@pytest.mark.filterwarnings("ignore:.plan.")
def test_a_part_is_read_when_it_is_read():
    model, x = OlderView().eval(), CALLS[0]
    prepared = qf.calibrate(prepare(model, INT8), CALLS, progress=False)
    converted = qf.convert(prepared)
    assert signal_to_noise(model(x).detach(), converted(x).detach()) > 30
    assert signal_to_noise(converted(x).detach(), lower(converted)(x)) > 35


def test_a_layer_before_a_write_that_no_other_sees_becomes_integers():
    """Its value is read before, or by the name that the write gives: quantized copies are right."""

    class ReadBefore(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            y = self.first(x)
            z = self.last(y)
            return z + self.last(y.relu_())

    plan = XNNPACKQuantizer().plan(qf.export(ReadBefore(), (CALLS[0],)).module())
    assert not plan.floating, str(plan)
