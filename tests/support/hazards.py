"""Known ways in which the stock path ends in a wrong or unloadable program: small networks, and the law that each must keep.

A toolchain (quantflow's is here, the stock one in ``benchmarks/stock_path.py``) is put through every law. A law returns the
signal to noise ratio in dB, of the ``.pte`` on the runtime unless it says otherwise.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from networks import (
    ConvTwoUsers,
    NoGradInside,
    SharedConv,
    SharedConvTwoNorms,
    randomize_statistics,
)
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.metrics import signal_to_noise
from quantizers import W4A8, XNNPACKQuantizer


@dataclass(frozen=True)
class Hazard:
    """A way to go wrong.

    Attributes:
        cause: What goes wrong on the stock path.
        law: Puts a toolchain to the test; dB.
        source: Where it is told of, or what told it.
        error: What quantflow's error says, where no right program can be had.
        least: What the law asks for, dB.
    """

    cause: str
    law: Callable
    source: str = "measured here"
    error: str = ""
    least: float = 20.0


class Quantflow:
    """quantflow with its defaults."""

    def prepare(self, model, args, *, qat=False, bits=8):
        quantizer = XNNPACKQuantizer(W4A8) if bits == 4 else XNNPACKQuantizer()
        graph = qf.export(model, args).module()
        return qf.prepare(graph.train() if qat else graph, quantizer, qat=qat)

    def calibrate(self, graph, args):
        qf.calibrate(graph, [args], progress=False)

    def train(self, graph, mode):
        graph.train(mode)

    def convert(self, graph):
        return qf.convert(graph)

    def lower(self, graph, args):
        return qf.export(graph, args).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)


def ptq(make, bits=8, lowering_only=False):
    """The program computes what the eager model computes (or, where bits are few, what the converted graph computes)."""

    def law(tools):
        model, args = make()
        model = model.eval()
        prepared = tools.prepare(model, args, bits=bits)
        with torch.no_grad():
            tools.calibrate(prepared, copy.deepcopy(args))
            converted = tools.convert(prepared)
            expected = (converted if lowering_only else model)(*copy.deepcopy(args))
        return signal_to_noise(expected.detach(), tools.lower(converted, args)(*args))

    return law


def statistics(make):
    """Batches seen in training mode leave in the program the batch norm that they leave in the eager model."""

    def law(tools):
        model, (x,) = make()
        prepared = tools.prepare(copy.deepcopy(model), (x,), qat=True)
        model.train()
        tools.train(prepared, True)
        with torch.no_grad():
            for step in range(4):
                batch = x * (1 + 0.05 * step)
                prepared(batch)
                model(batch)
        tools.train(prepared, False)
        program = tools.lower(tools.convert(prepared), (x,))
        return signal_to_noise(model.eval()(x).detach(), program(x))

    return law


def dropout_rate(tools):
    """Training goes on with the dropout that it began with. Graph; dB of the rate."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Dropout(0.1)), torch.rand(8, 3, 64, 64)
    nn.init.constant_(model[0].bias, 5.0)  # nothing else is zero
    prepared = tools.prepare(model, (x,), qat=True)
    for mode in (True, False, True):
        tools.train(prepared, mode)
        rate = float((prepared(x) == 0).float().mean())
    return 20 * math.log10(0.1 / max(abs(rate - 0.1), 1e-4))


def copied_model_in_eval(tools):
    """``eval()`` of a copy is ``eval()``. Graph."""
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(0.5)), torch.randn(8, 3, 8, 8)
    prepared = tools.prepare(model, (x,), qat=True)
    tools.train(prepared, True)
    prepared(x)
    copied = copy.deepcopy(prepared)
    copied.eval()
    return signal_to_noise(copied(x).detach(), copied(x).detach())


def one_signed_channels(tools):
    """Converting changes nothing that was trained, of 4-bit weights that are all positive. Converted graph."""
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3)), torch.randn(4, 8, 8, 8)
    nn.init.uniform_(model[0].weight, 0.01, 1.0)
    prepared = tools.prepare(model, (x,), qat=True, bits=4)
    tools.train(prepared, True)
    prepared(x)
    tools.train(prepared, False)
    trained = prepared(x).detach()
    return signal_to_noise(trained, tools.convert(prepared)(x).detach())


class Function(nn.Module):
    """A convolution and a function of its output and of further inputs."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 8, 3, padding=1), function

    def forward(self, x, *others):
        return self.function(self.conv(x), *others)


class SharedBias(nn.Module):
    """One layer called twice, on inputs of different ranges."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        nn.init.constant_(self.linear.bias, 1.0)

    def forward(self, x):
        return self.linear(torch.relu(self.linear(x)) * 3)


class DynamicFilter(nn.Module):
    """A convolution whose weight is computed from the input."""

    def __init__(self):
        super().__init__()
        self.conv, self.filter = nn.Conv2d(3, 8, 3), nn.Linear(3, 8)

    def forward(self, x):
        weight = self.filter(x.mean((0, 2, 3))).view(8, 1, 1, 1)
        return F.conv2d(self.conv(x), weight, groups=8)


def write_into_part(y):
    y[:, :2] = 0
    return y * 2


def write_through_a_view(y):
    y[:, :2].mul_(3.0)
    return y * 2


def image(*size, scale=1.0):
    return torch.randn(*(size or (2, 3, 12, 12))) * scale


def function(f, *others):
    return lambda: (Function(f), (image(), *others))


def layers(*made, x=None):
    return lambda: (nn.Sequential(*(make() for make in made)), (image() if x is None else x(),))


def module(kind, *size):
    return lambda: (randomize_statistics(kind()), (image(*size),))


def small_price():
    head = nn.Linear(16, 1)
    nn.init.normal_(head.weight, std=0.01)
    nn.init.constant_(head.bias, 300.0)
    return head


CONV = lambda: nn.Conv2d(3, 8, 3)  # noqa: E731
FUTURE = torch.triu(torch.ones(12, 12), 1).bool()

FLOOR = "executorch, get_symmetric_quantization_config: eps=2**-12"
PATCHED = "torchao, allow_exported_model_train_eval"
FOLD = "https://github.com/pytorch/ao/pull/2795"
MODES = "https://github.com/pytorch/ao/issues/2980"
LAYOUT = "decompositions share a dequantize"

HAZARDS = {
    "convolution called twice before one batch norm": Hazard(
        "folded at each call, into weights that are folded already", ptq(module(SharedConv, 2, 4, 9, 9)), FOLD
    ),
    "convolution called twice, each time before its own batch norm": Hazard(
        "both folded into one weight", ptq(module(SharedConvTwoNorms, 2, 4, 9, 9)), FOLD
    ),
    "convolution with a batch norm and another reader": Hazard(
        "folded without a look at the other reader", ptq(module(ConvTwoUsers, 2, 4, 9, 9))
    ),
    "one layer on two ranges": Hazard(
        "the bias is int32 in steps of the first call's input, and read in those of the second",
        ptq(lambda: (SharedBias(), (image(5, 4),))),
    ),
    "relu6 over a wide range": Hazard(
        "the range is that of the convolution, not of what relu6 leaves",
        ptq(layers(CONV, nn.ReLU6, lambda: nn.Conv2d(8, 8, 1), x=lambda: image(scale=300))),
    ),
    "quiet input": Hazard(
        "scales of activations are floored at 2^-12",
        ptq(layers(lambda: nn.Conv2d(3, 8, 3, bias=False), x=lambda: image(scale=1e-3))),
        FLOOR,
    ),
    "small product": Hazard("scales of activations are floored at 2^-12", ptq(function(lambda y: y * 1e-3)), FLOOR),
    "large bias of a small head": Hazard(
        "the bias overflows the int32 that it becomes", ptq(layers(small_price, x=lambda: image(8, 16, scale=0.01)))
    ),
    "mask of minus infinity": Hazard(
        "the range is infinite and quantizes to nothing",
        ptq(function(lambda y, m: torch.softmax(y + m, -1), torch.zeros(12, 12).masked_fill(FUTURE, -math.inf))),
        "https://github.com/pytorch/pytorch/pull/103467",
    ),
    "infinite constant": Hazard(
        "the range is infinite and quantizes to nothing",
        ptq(function(lambda y, m: torch.maximum(y + m, -y), torch.zeros(12, 12).masked_fill(FUTURE, -math.inf))),
        "https://github.com/pytorch/pytorch/pull/103467",
        error="infinite or not a number",
    ),
    "softmax behind a convolution": Hazard(
        "taken over what lies last in memory there, the channels", ptq(layers(CONV, lambda: nn.Softmax(-1)))
    ),
    "write into part of a tensor": Hazard(
        "readers hold quantized copies, which do not see it", ptq(function(write_into_part))
    ),
    "write through a view": Hazard(
        "readers hold quantized copies, which do not see it", ptq(function(write_through_a_view))
    ),
    "mish behind a convolution": Hazard(LAYOUT, ptq(layers(CONV, nn.Mish))),
    "softplus behind a convolution": Hazard(LAYOUT, ptq(layers(CONV, nn.Softplus))),
    "log sigmoid behind a convolution": Hazard(LAYOUT, ptq(layers(CONV, nn.LogSigmoid))),
    "prelu over a line": Hazard(
        "a pass of the delegate takes it for an image",
        ptq(layers(lambda: nn.Conv1d(4, 8, 3), lambda: nn.PReLU(8), x=lambda: image(2, 4, 20))),
    ),
    "view of seven dimensions": Hazard(
        "XNNPACK has six",
        ptq(function(lambda y: y.view(2, 2, 2, 2, 6, 6, 4).transpose(1, 2).reshape(2, 8, 12, 12) * 1.0)),
    ),
    "convolution over volumes": Hazard(
        "quantized, and no kernel runs it",
        ptq(lambda: (nn.Conv3d(3, 4, 3, padding=1), (image(1, 3, 4, 6, 6),))),
        "https://github.com/pytorch/executorch/issues/11704",
    ),
    "convolution with a computed weight": Hazard(
        "annotated as if constant", ptq(lambda: (DynamicFilter(), (image(),)))
    ),
    "bfloat16": Hazard(
        "quantized, and the kernels take float32",
        ptq(lambda: (CONV().bfloat16(), (image().bfloat16(),))),
    ),
    "4-bit convolution": Hazard(
        "weights are packed as if of a linear layer",
        ptq(lambda: (CONV(), (image(),)), bits=4, lowering_only=True),
    ),
    "4-bit linear, odd input": Hazard(
        "two weights a byte, across rows",
        ptq(lambda: (nn.Linear(15, 8), (image(4, 15),)), bits=4, lowering_only=True),
    ),
    "QAT: batch norm's eps": Hazard(
        "1e-5 is written in",
        statistics(lambda: (nn.Sequential(CONV(), nn.BatchNorm2d(8, eps=0.1)), (image(scale=0.3),))),
        MODES,
    ),
    "QAT: batch norm's momentum": Hazard(
        "0.1 is written in",
        statistics(lambda: (nn.Sequential(CONV(), nn.BatchNorm2d(8, momentum=0.9)), (image(),))),
        MODES,
    ),
    "QAT: dropout's p": Hazard("0.5 is written in", dropout_rate, MODES),
    "QAT: eval() of a copy": Hazard("does nothing: methods are patched on the instance", copied_model_in_eval, PATCHED),
    "QAT: weights of one sign": Hazard(
        "training and converting compute scales in two ways", one_signed_channels, least=40
    ),
    "QAT: convolution called twice before one batch norm": Hazard(
        "its two counters of batches are erased as one", statistics(module(SharedConv, 2, 4, 9, 9))
    ),
    "QAT: convolution with a batch norm and another reader": Hazard(
        "fused without a look at the other reader", statistics(module(ConvTwoUsers, 2, 4, 9, 9))
    ),
    "layers under no_grad": Hazard(
        "traced into a graph of their own, which stays float", ptq(lambda: (NoGradInside(), (image(4, 6),)))
    ),
}
