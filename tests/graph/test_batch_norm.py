"""Folding batch norm keeps the function, whatever shares the convolution."""

import copy

import pytest
import torch
from flow import lower, quantize
from networks import norm_networks, randomize_statistics, sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.aten import op
from quantflow.graph.batch_norm import fold_batch_norm, norm_as_convolution
from quantflow.graph.modes import BATCH_NORM
from quantflow.metrics import signal_to_noise
from quantizers import XNNPACKQuantizer

NETWORKS = norm_networks()
# Where the norm can't go: nothing before it, statistics of the batch, channels elsewhere, or another user.
UNFOLDED = dict.fromkeys(
    (
        "bn_alone",
        "conv_bn_no_statistics",
        "linear_3d_bn",
        "conv_two_users",
        "pre_activation",
        "concatenated",
    ),
    1,
)
ALONE_ON_IMAGES = ("bn_alone", "conv_two_users", "pre_activation", "conv_bn_bn", "concatenated")


@pytest.mark.parametrize("name", ALONE_ON_IMAGES)
def test_a_norm_alone_is_a_convolution(name):
    model, x = NETWORKS[name]
    graph = qf.export(randomize_statistics(copy.deepcopy(model)).eval(), (x,)).module()
    expected = graph(x)
    fold_batch_norm(graph)
    norm_as_convolution(graph)
    graph.recompile()
    assert not any(op(n) is BATCH_NORM for n in graph.graph.nodes)
    assert torch.allclose(graph(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_folding_keeps_the_function(name):
    model, x = NETWORKS[name]
    model = randomize_statistics(copy.deepcopy(model)).eval()
    graph = qf.export(model, (x,)).module()
    fold_batch_norm(graph)
    graph.recompile()
    expected = model(x)
    assert torch.allclose(graph(x), expected, rtol=1e-5, atol=1e-5)
    assert sum(op(n) is BATCH_NORM for n in graph.graph.nodes) == UNFOLDED.get(name, 0)


def test_folding_leaves_no_statistics_behind():
    model, x = NETWORKS["conv_bn"]
    graph = qf.export(copy.deepcopy(model).eval(), (x,)).module()
    fold_batch_norm(graph)
    assert set(graph.state_dict()) == {"0.weight", "0.bias"}


IMAGE = torch.randn(2, 3, 8, 8)


class Computed(nn.Module):
    """Batch norm and bias that follow from the input, not stored."""

    def __init__(self):
        super().__init__()
        self.conv, self.g = nn.Conv2d(3, 4, 1), nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x):
        g = self.g * x.mean()
        y = F.batch_norm(self.conv(x), self.mean, self.var, 1 + g, g * 0.5)
        return F.conv2d(y, torch.ones(2, 4, 1, 1), g[:2] * 2)


def test_computed_scale_and_bias_are_left_alone():
    model = Computed().eval()
    graph = qf.export(model, (IMAGE,)).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer())
    assert torch.allclose(prepared(IMAGE), model(IMAGE), atol=1e-5)
    assert any(
        "bias is computed" in d.reason or "weight is computed" in d.reason
        for d in XNNPACKQuantizer().plan(graph).floating
    )


class Tied(nn.Module):
    """Two convolutions with the same parameters, called before different norms; and one weight with two biases."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.b.weight, self.b.bias = self.a.weight, self.a.bias
        self.n1, self.n2, self.n3 = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.other = nn.Parameter(torch.randn(3))

    def forward(self, x):
        x = self.n2(self.b(self.n1(self.a(x))))
        x = self.n1(self.b(self.n3(self.a(x))))
        return self.n3(F.conv2d(x, self.a.weight, self.a.bias)) + self.n3(F.conv2d(x, self.a.weight, self.other))


@pytest.mark.parametrize("qat", [False, True])
def test_tied_parameters_fold_each_with_its_own_norm(qat):
    model = randomize_statistics(Tied()).eval()
    graph = qf.export(model, (IMAGE,)).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=qat)
    if not qat:
        assert torch.allclose(prepared(IMAGE), model(IMAGE), atol=1e-4)
    converted = qf.convert(qf.calibrate(prepared, [IMAGE], progress=False))
    assert sqnr(model(IMAGE), converted(IMAGE)) > 20


@pytest.mark.parametrize("qat", [False, True])
def test_batch_norm_over_rows_of_three_dimensions_behind_integers(qat):
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4)

        def forward(self, x):
            return self.last(self.norm(self.first(x).transpose(1, 2)).transpose(1, 2))

    model, x = randomize_statistics(Turned()).eval(), torch.randn(3, 5, 8)
    converted = quantize(model, x, qat=qat)
    with torch.no_grad():
        assert sqnr(model(x), converted(x)) > 25
        assert sqnr(converted(x), lower(converted, x)(x)) > 60


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("length", [6, 8])
def test_batch_norm_behind_a_convolution_without_a_batch_norms_no_channels(length, qat):
    """[channels, length]: batch norm counts dimension 1, the length."""
    model = randomize_statistics(nn.Sequential(nn.Conv1d(3, 8, 1), nn.BatchNorm1d(length), nn.Linear(length, 4))).eval()
    x = torch.randn(3, length)
    with torch.no_grad():
        assert sqnr(model(x), quantize(model, x, qat=qat)(x)) > 20


class FlattenedNorm(nn.Module):
    """A batch norm over the flattened rows of a linear layer, as LeViT has it."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        nn.init.normal_(self.norm.running_mean)

    def forward(self, x):
        x = self.linear(x)
        return self.norm(x.flatten(0, 1)).reshape_as(x)


def test_a_batch_norm_behind_a_flattened_linear_layer_is_folded():
    torch.manual_seed(0)
    model, x = FlattenedNorm().eval(), torch.randn(2, 5, 6)
    graph = qf.export(model, (x,), dynamic_batch=True).module().eval()
    quantizer = XNNPACKQuantizer()
    for qat in (False, True):
        operators = quantizer.plan(graph, qat=qat).operators
        assert ("linear", "batch_norm") in {o.operators for o in operators if o.becomes == "int8"}
        prepared = qf.calibrate(qf.prepare(graph, quantizer, qat=qat), [x], progress=False)
        converted = qf.convert(prepared)
        assert not any(op(node) is torch.ops.aten.batch_norm.default for node in converted.graph.nodes)
        assert signal_to_noise(model(x), converted(x)) > 30
        assert converted(torch.cat([x, x])).shape == (4, 5, 8)
    program = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    assert program.delegation.calls == 1
    assert signal_to_noise(model(x), program(x)) > 100


def test_a_flattened_norm_trains_as_the_model():
    torch.manual_seed(0)
    model, x = FlattenedNorm(), torch.randn(4, 5, 6)
    prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer(), qat=True).train()
    for module in prepared.modules():
        if isinstance(module, qf.FakeQuantize):
            module.disable_fake_quant()
    for network in (model, prepared):
        network(x).square().sum().backward()
    assert torch.allclose(prepared(x), model(x), atol=1e-6)
    for name, parameter in model.named_parameters():
        assert torch.allclose(prepared.get_parameter(name).grad, parameter.grad, atol=1e-5)
    assert torch.allclose(prepared.get_buffer("norm.running_mean"), model.norm.running_mean, atol=1e-6)
