"""4-bit weights with all 16 integers run as the converted graph says, packed or not."""

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.metrics import signal_to_noise
from quantizers import W4A8, Scheme, TensorScheme, XNNPACKQuantizer

PER_CHANNEL = TensorScheme(bits=4, symmetric=True, per_channel=True)
DYNAMIC = Scheme(activation=TensorScheme(dynamic=True), weight=PER_CHANNEL)
LAYERS = {
    "convolution": (lambda: nn.Conv2d(4, 8, 3), (2, 4, 6, 6), W4A8),
    "depthwise convolution": (lambda: nn.Conv2d(8, 8, 3, groups=8), (2, 8, 6, 6), W4A8),
    "transposed convolution": (lambda: nn.ConvTranspose2d(4, 8, 3), (2, 4, 6, 6), W4A8),
    "1-d convolution": (lambda: nn.Conv1d(4, 8, 3), (2, 4, 16), W4A8),
    "linear": (lambda: nn.Linear(16, 8), (4, 16), W4A8),
    "linear, odd input": (lambda: nn.Linear(15, 8), (4, 15), W4A8),
    "linear, volume": (lambda: nn.Linear(16, 8), (2, 3, 16), W4A8),
    "dynamic linear": (lambda: nn.Linear(16, 8), (4, 16), DYNAMIC),
    "dynamic linear, odd input": (lambda: nn.Linear(15, 8), (4, 15), DYNAMIC),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_program_computes_what_the_converted_graph_computes(name):
    torch.manual_seed(0)
    make, shape, scheme = LAYERS[name]
    x = torch.randn(shape)
    model = nn.Sequential(make(), nn.ReLU())
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer(scheme))
    converted = qf.convert(qf.calibrate(prepared, [x], progress=False))
    (weight,) = (buffer for name, buffer in converted.named_buffers() if name.endswith("_quantized"))
    weight.copy_(torch.randint(-8, 8, weight.shape))
    program = qf.export(converted, (x,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert program.delegation.calls == 1
    assert signal_to_noise(converted(x), program(x)) > 30


@pytest.mark.parametrize(("make", "shape"), [(nn.Linear, (256,)), (lambda i, o: nn.Conv2d(i, o, 1), (256, 2, 2))])
def test_weights_of_linear_layers_take_half_a_byte(make, shape):
    torch.manual_seed(0)
    model, x = make(256, 64).eval(), torch.randn(2, *shape)
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer(W4A8))
    converted = qf.convert(qf.calibrate(prepared, [x], progress=False))
    program = qf.export(converted, (x,)).to_core_aten().to_edge("xnnpack").to_executorch()
    packed = isinstance(model, nn.Linear)
    assert packed == (len(program.buffer) < 256 * 64)
