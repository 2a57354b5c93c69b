"""Fidelity is the signal to noise over all batches, the mean over outputs; accuracy counts examples."""

import pytest
import torch
from networks import Structured
from training_data import X, Y, graph

import quantflow as qf
from quantflow.metrics import signal_to_noise
from quantizers import XNNPACKQuantizer


def test_it_is_the_signal_to_noise_of_all_outputs_together():
    network = graph(qat=False).eval()
    quantized = qf.convert(qf.calibrate(qf.prepare(network, XNNPACKQuantizer()), [X], progress=False))
    with torch.no_grad():
        whole = signal_to_noise(network(X), quantized(X))
    assert qf.Fidelity(network, [X[:8], (X[8:], "a target")])(quantized) == pytest.approx(whole, rel=1e-6)
    assert qf.Fidelity(network, [X])(network) == float("inf")


def test_outputs_count_alike():
    x, y = torch.randn(6, 8), torch.randn(6, 4)
    network = qf.export(Structured(), (x,), {"y": y}).module().eval()
    other = qf.export(Scaled(network), (x,), {"y": y}).module().eval()
    found = qf.Fidelity(network, [{"x": x, "y": y}])(other)
    assert found == pytest.approx((20 + 40 + 30) / 3, abs=0.01)


class Scaled(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)
        self.linear.load_state_dict({"weight": inner.linear.weight, "bias": inner.linear.bias})

    def forward(self, x, *, y):
        hidden = self.linear(x)
        return {"sum": (hidden + y) * 1.1, "parts": (hidden * 1.01, y * 2 * (1 + 10**-1.5))}


def test_no_data_are_named():
    network = graph(qat=False).eval()
    with pytest.raises(qf.QuantflowError, match="no data to validate"):
        qf.Fidelity(network, [])(network)
    with pytest.raises(qf.QuantflowError, match="no data to validate"):
        qf.Accuracy([])(network)


def test_accuracy_counts_examples_not_batches():
    network = graph(qat=False).eval()
    with torch.no_grad():
        wanted = float((network(X).argmax(1) == Y).double().mean())
    assert qf.Accuracy([(X[:3], Y[:3]), (X[3:], Y[3:])])(network) == pytest.approx(wanted)
    with pytest.raises(qf.QuantflowError, match="no scores of classes"):
        qf.Accuracy([X])(network)
