"""What is the identity in inference stays an operator of its own: the captured graph trains as eager does."""

import copy

import pytest
import torch
from dropout_networks import Around, Residual, Telling
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.inference_mode import set_mode
from quantflow.observers.fake_quantize import FakeQuantize
from quantizers import XNNPACKQuantizer


class Functional(nn.Module):
    """Dropout as functions, by position and by name, read by several."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        y = F.dropout(x, 0.3, self.training)
        z = torch.dropout(x, 0.3, self.training)
        w = F.dropout(input=x, p=0.2, training=self.training)
        v = torch.ops.aten.dropout(x, 0.1, self.training) + torch.ops.aten.dropout.default(x, 0.2, self.training)
        return x * y + self.linear(z) + w + F.dropout(x, 0.5, self.training, inplace=False) + y + v


class Chain(nn.Module):
    """Dropouts of dropouts, one called twice, behind a view."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.identity, self.linear = nn.Dropout(0.2), nn.Dropout(0.4), nn.Identity(), nn.Linear(6, 6)

    def forward(self, x):
        rows = self.identity(x.flatten(1)).view_as(x)
        y = self.b(self.a(rows))
        return x + rows + self.linear(y) + self.a(y) + self.a(rows)


class InPlace(nn.Module):
    """In place, the input itself is dropped: the residual too."""

    def __init__(self):
        super().__init__()
        self.drop, self.linear = nn.Dropout(0.4, inplace=True), nn.Linear(6, 6)

    def forward(self, x):
        x = self.linear(x)
        return x + torch.relu(self.drop(x))


class Frozen(nn.Module):
    """A batch norm that its own model keeps in inference."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.free = nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.free(self.norm(self.conv(x)))

    def train(self, mode=True):
        super().train(mode)
        self.norm.eval()
        return self


class FunctionalFrozen(nn.Module):
    """Batch norm as a function that never trains, and dropout that is always off."""

    def __init__(self):
        super().__init__()
        self.conv, self.free = nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5)
        self.register_buffer("mean", torch.randn(5))
        self.register_buffer("var", torch.rand(5) + 0.5)

    def forward(self, x):
        return self.free(F.dropout(F.batch_norm(self.conv(x), self.mean, self.var, None, None, False), 0.5, False))


class WithoutGradients(nn.Module):
    """A backbone whose gradients are off, frozen or with a norm that trains and is called again."""

    def __init__(self, momentum, frozen):
        super().__init__()
        self.body = nn.Sequential(nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5, momentum=momentum), nn.Dropout(0.4))
        self.norm = nn.BatchNorm1d(5) if frozen else self.body[1]
        self.head, self.frozen = nn.Linear(6, 6), frozen

    def forward(self, x):
        with torch.no_grad():
            x = self.body(x)
            with torch.enable_grad():
                x = self.norm(self.head(x))
        return x + self.head(x).sum(-1, keepdim=True)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self


class Precision(nn.Module):
    """A norm, a dropout and a counter under an autocast."""

    def __init__(self, enabled):
        super().__init__()
        self.conv, self.norm, self.drop, self.enabled = nn.Conv1d(5, 5, 1), nn.BatchNorm1d(5), nn.Dropout(0.4), enabled
        self.head = nn.Linear(6, 6)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            self.calls.add_(1)
            x = self.drop(self.norm(self.conv(x)))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            x = self.drop(self.norm(x + self.conv(x)))
            with torch.autocast("cpu", enabled=False):
                x = self.drop(x)
        return self.head(x * self.calls.expand(6))


def captured(model):
    return qf.export(model, (torch.randn(4, 5, 6),)).module()


def captured_by_torch(model):
    return torch.export.export(model.eval(), (torch.randn(4, 5, 6),)).module()


NETWORKS = {
    **{
        kind.__name__: lambda kind=kind: Residual(kind(0.4))
        for kind in (nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    },
    "functional": Functional,
    "chain": Chain,
    "in place": InPlace,
    "frozen": Frozen,
    "functional frozen": FunctionalFrozen,
    "frozen without gradients": lambda: WithoutGradients(0.1, True),
    "trained without gradients": lambda: WithoutGradients(0.1, False),
    "cumulative without gradients": lambda: WithoutGradients(None, False),
    "autocast off": lambda: Precision(False),
    "autocast on": lambda: Precision(True),
    "telling": Telling,
    "around a graph": lambda: Around(captured(Frozen())),
    "graph of graphs": lambda: nn.Sequential(captured(Frozen()), captured(Telling())),
    "around a graph of torch": lambda: Around(captured_by_torch(Residual(nn.Dropout(0.4)))),
}


def step(module, x):
    torch.manual_seed(3)
    module.zero_grad()
    y = module(x)
    y.square().mean().backward()
    gradients = {k: p.grad for k, p in module.named_parameters() if p.grad is not None}
    return y.detach(), gradients, dict(module.named_buffers()), torch.get_rng_state()


def in_mode(module, training):
    set_mode(module, training)
    return module


def assert_same(ours, eager):
    assert torch.allclose(ours[0], eager[0], rtol=1e-5, atol=1e-6)
    assert ours[1].keys() == eager[1].keys()
    for mine, theirs in zip(ours[1:3], eager[1:3], strict=True):
        for name, tensor in theirs.items():
            assert torch.allclose(mine[name].float(), tensor.float(), rtol=1e-4, atol=1e-5), name
    assert torch.equal(ours[3], eager[3])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_trains_as_eager(name, strict):
    torch.manual_seed(0)
    model, x = NETWORKS[name](), torch.randn(4, 5, 6)
    graph = qf.export(model, (x,), strict=strict).module()
    again = qf.export(graph, (x,)).module()
    for mode in (True, False, True):
        eager = step(in_mode(copy.deepcopy(model), mode), x)
        for captured in (graph, again):
            assert_same(step(copy.deepcopy(captured).train(mode), x), eager)


@pytest.mark.parametrize("name", NETWORKS)
def test_prepared_with_rounding_off_trains_as_eager(name):
    torch.manual_seed(0)
    model, x = NETWORKS[name](), torch.randn(4, 5, 6)
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer(), qat=True).train()
    for module in prepared.modules():
        if isinstance(module, FakeQuantize):
            module.enable_fake_quant(False)
    assert_same(step(prepared, x), step(in_mode(model, True), x))


def test_no_alias_is_left():
    model, x = Chain(), torch.randn(4, 5, 6)
    program = qf.export(model, (x,)).program
    assert not any(node.target is torch.ops.aten.alias.default for node in program.graph.nodes)


def test_a_graph_that_is_captured_again_is_left_as_it_was():
    graph = qf.export(Residual(nn.Dropout(0.4)), (torch.randn(4, 6),)).module()
    before = graph.code
    qf.export(graph, (torch.randn(4, 6),))
    assert graph.code == before


@pytest.mark.parametrize("name", ["frozen", "frozen without gradients", "trained without gradients"])
def test_a_program_captured_in_training_mode_elsewhere_keeps_what_is_frozen(name):
    torch.manual_seed(0)
    model, x = NETWORKS[name]().train(), torch.randn(4, 5, 6)
    graph = qf.export(torch.export.export(copy.deepcopy(model), (x,))).module()
    assert_same(step(graph.train(), x), step(model, x))
