"""Networks that take one example without a batch dimension: every pass works on them, or leaves them as they are."""

import pytest
import torch
from networks import sqnr
from torch import nn

import quantflow as qf
from quantflow.ptq import adaround, correct_bias, equalize, smooth
from quantizers import XNNPACKQuantizer


class Single(nn.Module):
    """Linear layers on [features], a norm, and a sum that spreads one feature over others."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.one, self.many, self.norm = nn.Linear(16, 1), nn.Linear(16, 16), nn.LayerNorm(8)

    def forward(self, x):
        x = torch.relu(self.first(self.norm(x)))
        x = torch.relu(self.second(x))
        return self.head(torch.relu(self.one(x) + self.many(x)))


@pytest.fixture(scope="module")
def single():
    torch.manual_seed(0)
    model = Single().eval()
    data = [torch.randn(8) for _ in range(48)]
    graph = qf.export(model, (data[0],)).module().eval()
    prepared, sample = qf.prepare(graph, XNNPACKQuantizer(skip=["norm"])), qf.Sample()
    return model, data, graph, qf.calibrate(prepared, data, sample=sample, progress=False), sample


def test_float_passes_leave_the_function(single):
    model, data, graph, _, _ = single
    for changed in (equalize(graph), equalize(graph, data), smooth(graph, data)):
        moved = [n for n, t in changed.state_dict().items() if not torch.equal(t, graph.state_dict()[n])]
        assert moved
        with torch.no_grad():
            for x in data:
                torch.testing.assert_close(changed(x), model(x), rtol=1e-4, atol=1e-4)


def test_passes_on_prepared_graphs_bring_something(single):
    model, data, _, prepared, sample = single
    with torch.no_grad():
        exact = torch.stack([model(x) for x in data])

    def found(graph):
        converted = qf.convert(graph)
        with torch.no_grad():
            return torch.stack([converted(x) for x in data])

    before, corrected = found(prepared), found(correct_bias(prepared, sample, progress=False))
    assert (corrected - exact).mean(0).norm() < 0.7 * (before - exact).mean(0).norm()
    assert sqnr(exact, found(adaround(prepared, sample, iterations=40, progress=False))) > sqnr(exact, before) - 1
    assert sqnr(exact, found(qf.recover(prepared, sample, progress=False).graph)) > sqnr(exact, before)


def test_they_are_quantized_where_no_batch_is_asked_for():
    model, data = (
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval(),
        [torch.randn(8) for _ in range(9)],
    )
    result = qf.quantize(model, (data[0],), data, dynamic_batch=False, progress=False)
    with torch.no_grad():
        assert sqnr(torch.stack([model(x) for x in data]), torch.stack([result.program(x) for x in data])) > 20
    with pytest.raises(qf.QuantflowError, match="dynamic_batch=False"):
        qf.quantize(model, (data[0],), data, progress=False)
