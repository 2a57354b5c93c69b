"""Weights that a layer computes are quantized as others are, and train under their own names."""

import copy

import pytest
import torch
from constants import COMPUTED, IMAGE, ROWS, StandardizedConv, captured
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.analysis.reference import reference_graph
from quantflow.graph.aten import op
from quantflow.graph.constants import follows_from_constants
from quantflow.metrics import signal_to_noise
from quantflow.ptq import equalize
from quantizers import XNNPACKQuantizer


@pytest.mark.parametrize("qat", [False, True])
@pytest.mark.parametrize("name", ["standardised weight", "weight norm", "spectral norm", "joined bias"])
def test_layers_with_computed_weights_are_quantized(name, qat):
    model, x, graph = captured(*COMPUTED[name])
    quantizer = XNNPACKQuantizer()
    assert [o.becomes for o in quantizer.plan(graph, qat=qat).operators] == ["int8"]
    prepared = qf.prepare(graph, quantizer, qat=qat)
    qf.calibrate(prepared, [x], progress=False)
    converted = qf.convert(prepared)
    assert not any(op(n) is torch.ops.aten.batch_norm.default for n in converted.graph.nodes)
    program = qf.export(converted, (x,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    assert program.delegation.calls == 1
    assert not program.delegation.portable
    assert torch.allclose(program(x), model(x), atol=0.05 * float(model(x).detach().abs().max()))


@pytest.mark.parametrize("name", ["standardised weight", "weight norm", "spectral norm", "joined bias"])
def test_a_computed_weight_trains_under_its_own_names(name):
    model, x, graph = captured(*COMPUTED[name])
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=True)
    qf.calibrate(prepared, [x], progress=False)
    own = dict(prepared.named_parameters())
    assert own.keys() == dict(model.named_parameters()).keys()
    before = copy.deepcopy(prepared.state_dict())
    optimizer = torch.optim.SGD(prepared.parameters(), 0.1)
    prepared.train()
    prepared(x).square().mean().backward()
    assert all(parameter.grad is not None for parameter in own.values())
    optimizer.step()
    assert any(not torch.equal(before[key], prepared.state_dict()[key]) for key in own)
    prepared.eval()
    assert torch.allclose(qf.convert(prepared)(x), prepared(x), atol=1e-5)
    model.load_state_dict({key: value for key, value in prepared.state_dict().items() if key in model.state_dict()})


@pytest.mark.parametrize("name", ["standardised weight", "joined bias"])
def test_without_rounding_a_graph_prepared_for_training_is_the_model(name):
    model, x, graph = captured(*COMPUTED[name])
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=True)
    for module in prepared.modules():
        if isinstance(module, qf.FakeQuantize):
            module.disable_fake_quant()
    prepared.train()
    model.train()
    for network in (model, prepared):
        network.zero_grad()
        network(x).square().sum().backward()
    assert torch.equal(prepared(x), model(x))
    theirs = dict(model.named_parameters())
    for key, parameter in prepared.named_parameters():
        assert torch.equal(parameter.grad, theirs[key].grad)


def test_a_batch_norm_behind_a_computed_weight_is_folded():
    class Normed(nn.Sequential):
        def __init__(self):
            super().__init__(StandardizedConv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
            nn.init.uniform_(self[1].running_var, 0.5, 2.0)
            nn.init.normal_(self[1].running_mean)

    model, x, graph = captured(Normed, IMAGE)
    for qat in (False, True):
        prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=qat)
        qf.calibrate(prepared, [x], progress=False)
        converted = qf.convert(prepared)
        assert not any(op(n) is torch.ops.aten.batch_norm.default for n in converted.graph.nodes)
        assert signal_to_noise(model(x), converted(x)) > 30
        if qat:
            assert signal_to_noise(prepared.eval()(x), converted(x)) > 45  # the bias is rounded


def test_a_dynamic_weight_does_not_follow_from_constants():
    class Dynamic(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return F.linear(x, self.weight * x.mean())

    _, _, graph = captured(Dynamic, ROWS)
    (linear,) = (n for n in graph.graph.nodes if op(n) is torch.ops.aten.linear.default)
    assert not follows_from_constants(linear.args[1])
    assert XNNPACKQuantizer().plan(graph).decisions[-1].reason == "its weight is computed, not constant"


def test_a_computed_weight_before_a_norm_is_equalized_referenced_and_recovered():
    class Normed(nn.Sequential):
        def __init__(self):
            super().__init__(StandardizedConv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))

    model, x, graph = captured(Normed, IMAGE)
    assert torch.allclose(equalize(graph)(x), model(x), atol=1e-5)
    assert torch.allclose(reference_graph(graph, "test")(x), model(x), atol=1e-5)
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer(), qat=True), [x], progress=False)
    recovered = qf.recover(prepared, [x], progress=False).graph
    recovered.train()(x).square().sum().backward()
    assert signal_to_noise(model(x), qf.convert(recovered.eval())(x)) > 25


def test_what_a_quantizer_transposes_is_one_parameter():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return x @ self.matrix

    _, _, graph = captured(Product, ROWS)
    assert len(list(qf.prepare(graph, XNNPACKQuantizer()).parameters())) == 1
