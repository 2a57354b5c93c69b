"""Recurrent layers as linear layers and arithmetic: the same function and gradients, and integers on the runtime."""

import copy

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.graph.aten import op
from quantflow.graph.rewrites import RECURRENT_REWRITES, rewrite
from quantflow.metrics import signal_to_noise
from quantizers import XNNPACKQuantizer

LAYERS = {
    "LSTM": lambda: nn.LSTM(6, 8, batch_first=True),
    "LSTM, time first": lambda: nn.LSTM(6, 8),
    "LSTM of two layers": lambda: nn.LSTM(6, 8, 2, batch_first=True),
    "LSTM of both directions": lambda: nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True),
    "LSTM without biases": lambda: nn.LSTM(6, 8, bias=False, batch_first=True),
    "GRU": lambda: nn.GRU(6, 8, batch_first=True),
    "GRU of both directions": lambda: nn.GRU(6, 8, 2, batch_first=True, bidirectional=True),
    "RNN": lambda: nn.RNN(6, 8, batch_first=True),
    "RNN with relu": lambda: nn.RNN(6, 8, batch_first=True, nonlinearity="relu"),
}
KEPT = {
    "LSTM with a projection": lambda: nn.LSTM(6, 8, batch_first=True, proj_size=3),
}


class States(nn.Module):
    """The outputs and the last states of a recurrent layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        outputs, last = self.layer(x)
        return outputs, *(last if isinstance(last, tuple) else (last,))


@pytest.mark.parametrize("name", [*LAYERS, *KEPT])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_function_and_gradients_stay(name, dynamic):
    torch.manual_seed(0)
    model = States((LAYERS.get(name) or KEPT[name])())
    first = getattr(model.layer, "batch_first", True)
    shapes = None if first or not dynamic else ({1: torch.export.Dim("batch", min=1)},)
    x = torch.randn(3, 5, 6)
    graph = qf.export(model, (x,), dynamic_batch=dynamic and first, dynamic_shapes=shapes).module()
    rewritten = rewrite(copy.deepcopy(graph), RECURRENT_REWRITES)
    assert (not {op(n) for n in rewritten.graph.nodes} & set(RECURRENT_REWRITES)) == (name in LAYERS)
    if dynamic:
        x = torch.randn(4, 5, 6) if first else torch.randn(3, 7, 6)
    for ours, theirs in zip(rewritten(x), model(x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)
    for network in (model, rewritten):
        sum(y.square().sum() for y in network(x)).backward()
    for key, parameter in model.named_parameters():
        assert torch.allclose(rewritten.get_parameter(key).grad, parameter.grad, rtol=1e-4, atol=1e-5)


def test_a_state_that_is_given_is_the_first():
    class Given(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.GRU(6, 8, 2, batch_first=True)

        def forward(self, x, state):
            return self.layer(x, state)

    torch.manual_seed(0)
    model, x, state = Given(), torch.randn(2, 5, 6), torch.randn(2, 2, 8)
    rewritten = rewrite(qf.export(model, (x, state)).module(), RECURRENT_REWRITES)
    for ours, theirs in zip(rewritten(x, state), model(x, state), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_dropout_between_layers_follows_the_mode():
    torch.manual_seed(0)
    model = States(nn.LSTM(6, 8, 2, batch_first=True, dropout=0.5))
    x = torch.randn(2, 5, 6)
    rewritten = rewrite(qf.export(model, (x,)).module(), RECURRENT_REWRITES)
    assert torch.allclose(rewritten.eval()(x)[0], model.eval()(x)[0], atol=1e-6)
    rewritten.train()
    assert not torch.equal(rewritten(x)[0], rewritten(x)[0])


class Classifier(nn.Module):
    """A class of a sequence, by the last output of a recurrent layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.head = layer, nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("qat", [False, True], ids=["PTQ", "QAT"])
def test_a_classifier_of_sequences_is_integers_in_one_call(kind, qat):
    torch.manual_seed(0)
    model, data = Classifier(kind(64, 32, batch_first=True)).eval(), [torch.randn(8, 12, 64) for _ in range(4)]
    x = torch.randn(1, 12, 64)
    graph = qf.export(model, (x,), dynamic_batch=True).module()
    quantizer = XNNPACKQuantizer()
    plan = quantizer.plan(graph, qat=qat)
    assert plan.calls == 1
    assert all(d.scheme is not None for d in plan.decisions if op(d.node) is torch.ops.aten.linear.default)
    prepared = qf.calibrate(qf.prepare(graph, quantizer, qat=qat), data, progress=False)
    converted = qf.convert(prepared)
    program = qf.export(converted, (x,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    assert program.delegation.calls == 1
    assert not program.delegation.portable
    assert signal_to_noise(converted(x), program(x)) > 25
    assert signal_to_noise(model(x), converted(x)) > 20
    lowered = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    assert lowered.delegation.calls == 1
    assert signal_to_noise(model(x), lowered(x)) > 90
