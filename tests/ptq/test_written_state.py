"""Recovery of networks that write in place."""

import copy

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.metrics import signal_to_noise as sqnr
from quantflow.ptq import correct_bias, reconstruct_weights
from quantflow.simulation.output_gradients import output_gradients
from quantflow.simulation.paired_interpreter import run_paired
from quantflow.simulation.quantized_layers import quantized_layers
from quantizers import XNNPACKQuantizer


class Grows(nn.Module):
    """A counter that the output follows."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.register_buffer("count", torch.tensor(0.3))

    def forward(self, x):
        self.count += 1
        return self.conv(x) * 0.5 + self.count * 0.1


@pytest.mark.filterwarnings("ignore:.*left to portable kernels:quantflow.QuantflowWarning")
def test_recovery_leaves_the_ranges_that_state_grows_into():
    model, x = Grows().eval(), torch.rand(2, 3, 6, 6)
    result = qf.quantize(model, (x,), [x] * 8, progress=False)
    assert result.report.recovered.steps[0].name == "as calibrated"
    twin = copy.deepcopy(model)
    for _ in range(8):
        with torch.no_grad():
            expected = twin(x)
        assert torch.allclose(result.graph(x), expected, atol=0.02)


class WritesWhatBothShare(nn.Module):
    """What quantization does not change, a row of an embedding or zeros, written in place with what it does change."""

    def __init__(self, shared, write):
        super().__init__()
        self.embedding, self.shared, self.write = nn.Embedding(10, 8), shared, write
        self.own, self.first, self.last = nn.Linear(4, 4), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, i, z):
        h = self.shared(self, i)
        self.write(h, self.own(z))
        return self.last(self.first(h))


SHARED = {
    "an embedding": lambda net, i: net.embedding(i),
    "zeros": lambda net, i: torch.zeros(i.shape[0], 8),
}
WRITES = {
    "through a slice": lambda h, y: h[:, :4].add_(y),
    "through a part": lambda h, y: h.view(-1, 2, 4).select(1, 1).copy_(y),
    "whole": lambda h, y: h.add_(torch.cat([y, y], 1)).view(-1, 2, 4)[:, 0].mul_(2.0),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("shared", SHARED)
def test_recovery_compares_with_the_float_network_where_both_share_what_is_written(shared, write):
    torch.manual_seed(0)
    model = WritesWhatBothShare(SHARED[shared], WRITES[write]).eval()
    data = [(torch.randint(0, 10, (8,)), torch.randn(8, 4)) for _ in range(4)]
    prepared = qf.prepare(qf.export(model, data[0]).module(), XNNPACKQuantizer())
    prepared = qf.calibrate(prepared, data, progress=False)
    expected = torch.cat([model(*x).detach() for x in data])
    layers = quantized_layers(prepared)
    (last,) = (node for node, layer in layers.items() if layer.weight.args[0].target.endswith("last.weight"))
    for stop in run_paired(prepared, data, layers, title="", progress=False):
        if stop.layer.node is last:
            found = torch.cat([values[last] for values in stop.floats])
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        before = sqnr(expected, torch.cat([qf.convert(prepared)(*x) for x in data]))
        for recover in (correct_bias, reconstruct_weights):
            recovered = qf.convert(recover(prepared, data, progress=False))
            assert sqnr(expected, torch.cat([recovered(*x) for x in data])) > before - 1
    assert len(output_gradients(prepared, data, progress=False).rows) == len(layers)
