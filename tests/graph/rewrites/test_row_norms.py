"""Norms over the last dimensions as arithmetic: the same function and gradients, and one call of the delegate."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.aten import op
from quantflow.graph.rewrites import ROW_NORM_REWRITES, rewrite
from quantflow.metrics import signal_to_noise
from quantizers import XNNPACKQuantizer


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.ones(8)), function

    def forward(self, x):
        return self.function(x * self.scale)


NORMS = {
    "layer norm": lambda: nn.LayerNorm(8),
    "layer norm without weights": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "layer norm without a bias": lambda: nn.LayerNorm(8, bias=False),
    "layer norm of two dimensions": lambda: nn.LayerNorm((6, 8)),
    "layer norm of images": lambda: Function(lambda x: F.layer_norm(x.unflatten(1, (2, 3)), (3, 8), eps=1e-2)),
    "rms norm": lambda: nn.RMSNorm(8),
    "rms norm of two dimensions": lambda: nn.RMSNorm((6, 8), eps=1e-3),
    "normalized": lambda: Function(lambda x: F.normalize(x, dim=-1)),
    "normalized tokens": lambda: Function(lambda x: F.normalize(x, dim=1)),
}


def _made(name):
    torch.manual_seed(0)
    model = nn.Sequential(Function(lambda x: x * 1.0), NORMS[name]())
    for parameter in model[1].parameters():
        nn.init.normal_(parameter, 1.0)
    return model


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_function_and_gradients_stay(name, dynamic):
    model = _made(name)
    graph = qf.export(model, (torch.randn(3, 6, 8),), dynamic_batch=dynamic).module()
    rewritten = rewrite(copy.deepcopy(graph), ROW_NORM_REWRITES)
    assert not {op(node) for node in rewritten.graph.nodes} & set(ROW_NORM_REWRITES)
    x = torch.randn(5 if dynamic else 3, 6, 8)
    assert torch.allclose(model(x), rewritten(x), rtol=1e-5, atol=1e-5)
    for network in (model, rewritten):
        network(x).square().sum().backward()
    for key, parameter in model.named_parameters():
        assert torch.allclose(rewritten.get_parameter(key).grad, parameter.grad, rtol=1e-3, atol=1e-4)
    assert all("val" in n.meta for n in rewritten.graph.nodes if n.op == "call_function")


def test_a_large_mean_costs_few_digits():
    model, x = nn.LayerNorm(64), torch.randn(4, 64, dtype=torch.float64) + 1000
    rewritten = rewrite(qf.export(model, (x.float(),)).module(), ROW_NORM_REWRITES)
    exact = F.layer_norm(x.float().double(), (64,), eps=model.eps)
    assert signal_to_noise(exact, rewritten(x.float()).double()) > 80


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
def test_runs_inside_the_delegate(name, quantized):
    model = nn.Sequential(nn.Linear(8, 8), _made(name), *([] if "images" in name else [nn.Linear(8, 4)])).eval()
    x = torch.randn(3, 6, 8)
    graph = qf.export(model, (x,)).module()
    if quantized:
        quantizer = XNNPACKQuantizer()
        assert quantizer.plan(graph).calls == 1
        graph = qf.convert(qf.calibrate(qf.prepare(graph, quantizer), [x], progress=False))
    program = qf.export(graph, (x,)).to_core_aten().to_edge("xnnpack").to_executorch(strict=True)
    assert program.delegation.calls == 1
    assert not program.delegation.portable
    assert signal_to_noise(graph(x), program(x)) > (35 if quantized else 90)


def test_half_precision_keeps_its_norm():
    graph = qf.export(nn.LayerNorm(8).half(), (torch.randn(2, 8).half(),)).module()
    rewritten = rewrite(copy.deepcopy(graph), ROW_NORM_REWRITES)
    assert torch.ops.aten.layer_norm.default in {op(node) for node in rewritten.graph.nodes}
