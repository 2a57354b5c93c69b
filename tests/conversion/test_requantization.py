"""Dead and almost dead layers: every ratio of steps stays within what the backend takes."""

import pytest
import torch
from networks import sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantizers import XNNPACKQuantizer

X = torch.randn(2, 3, 8, 8)


class Dead(nn.Module):
    """A ReLU that no data wake (or hardly), read by ``reader``."""

    def __init__(self, reader, bias):
        super().__init__()
        self.reader = reader
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.linear = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        nn.init.constant_(self.norm.bias, bias)

    def forward(self, x):
        return self.reader(self, F.relu(self.norm(self.first(x))))


READERS = {
    "output": lambda m, dead: dead,
    "convolution": lambda m, dead: m.second(dead),
    "residual": lambda m, dead: dead + m.second(dead),
    "product": lambda m, dead: dead * torch.sigmoid(m.second(dead)),
    "mean": lambda m, dead: m.linear(dead.mean((2, 3))),
    "pool": lambda m, dead: m.second(F.max_pool2d(dead, 2)),
    "product of dead": lambda m, dead: dead * dead,
    "sum of dead": lambda m, dead: m.second(dead + dead),
}


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("reader", READERS)
def test_a_dead_relu_is_named_and_its_program_right(reader, qat):
    torch.manual_seed(0)
    model = Dead(READERS[reader], bias=-100.0).eval()
    prepared = qf.prepare(qf.export(model, (X,)).module(), XNNPACKQuantizer(), qat=qat)
    with pytest.warns(qf.QuantflowWarning, match=r"\[calibrate\] first "):
        qf.calibrate(prepared, [X], progress=False)
    converted = qf.convert(prepared)
    program = qf.export(converted, (X,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    with torch.no_grad():
        assert torch.allclose(model(X), program(X), atol=0.02)
        assert torch.allclose(converted(X), program(X), atol=1e-3)


@pytest.mark.parametrize("rest", [1e-6, 1e-3])
def test_a_relu_that_hardly_wakes(rest):
    torch.manual_seed(0)
    model = Dead(READERS["convolution"], 0.0).eval()
    with torch.no_grad():
        model.norm.bias.sub_(model.norm(model.first(X)).max() - rest)
    prepared = qf.calibrate(qf.prepare(qf.export(model, (X,)).module(), XNNPACKQuantizer()), [X], progress=False)
    converted = qf.convert(prepared)
    program = qf.export(converted, (X,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    assert sqnr(converted(X), program(X)) > 35
    assert sqnr(model(X), program(X)) > 25


class LayerScale(nn.Module):
    """A branch so small that the kernel of the sum has no multiplier for it."""

    def __init__(self, combine):
        super().__init__()
        self.combine, self.conv, self.head = combine, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.gamma = nn.Parameter(torch.full((3, 1, 1), 1e-6))

    def forward(self, x):
        return self.head(self.combine(x, self.conv(x) * self.gamma))


@pytest.mark.parametrize("combine", [torch.add, torch.sub, lambda x, y: F.relu(x + y), lambda x, y: (x * y) * 1e6 + x])
def test_operands_of_very_different_steps(combine):
    torch.manual_seed(0)
    model = LayerScale(combine).eval()
    converted = qf.convert(
        qf.calibrate(qf.prepare(qf.export(model, (X,)).module(), XNNPACKQuantizer()), [X], progress=False)
    )
    program = qf.export(converted, (X,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    assert program.delegation.calls == 1
    assert sqnr(converted(X), program(X)) > 35
    assert sqnr(model(X), program(X)) > 25
