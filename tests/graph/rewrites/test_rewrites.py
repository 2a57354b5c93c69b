"""Rewrites: the same function and gradients in float, for any batch, and none of the operators that a backend lacks."""

import copy

import pytest
import torch
from networks import sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.aten import op
from quantflow.graph.rewrites import REWRITES, rewrite
from quantizers import RuleQuantizer, XNNPACKQuantizer

IMAGE = torch.randn(3, 8, 6, 6) * 3

FUNCTIONS = {
    "same padding": lambda x: F.conv2d(x, torch.ones(4, 8, 4, 3), padding="same", dilation=(1, 2)),
    "valid padding": lambda x: F.conv2d(x, torch.ones(4, 8, 2, 3), padding="valid"),
    "silu": F.silu,
    "silu in place": lambda x: F.silu(x + 0, inplace=True),
    "hardsigmoid": F.hardsigmoid,
    "mean": lambda x: x.mean((2, 3)),
    "mean of others": lambda x: x.mean(1),
    "select": lambda x: x[:, 2] + x.select(1, 1),
    "select from the end": lambda x: x[:, -1],
    "avg_pool2d": lambda x: F.avg_pool2d(x, 2),
    "avg_pool2d padded": lambda x: F.avg_pool2d(x, 3, 2, 1),
    "avg_pool2d whose ceiling adds no window": lambda x: F.avg_pool2d(x, 2, ceil_mode=True),
    "avg_pool2d whose ceiling adds a window": lambda x: F.avg_pool2d(x, 3, 2, ceil_mode=True),
    "pad that cuts off": lambda x: F.pad(x, (-1, 2, 0, -2), value=0.5),
    "unfold": lambda x: F.unfold(x, (2, 3), dilation=(1, 2), padding=1, stride=2),
    "fold": lambda x: F.fold(F.unfold(x, 2, stride=(1, 2)), (6, 6), 2, stride=(1, 2)),
    "avg_pool2d with a ceiling, padded": lambda x: F.avg_pool2d(x, (3, 2), (2, 3), (1, 1), ceil_mode=True),
    "avg_pool2d with a ceiling, padding not counted": lambda x: F.avg_pool2d(x, 3, 2, 1, True, False),
    "avg_pool2d with a divisor": lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=5),
    "greatest of images": lambda x: x.amax((2, 3)),
    "greatest of channels": lambda x: x * x.amax(1, keepdim=True) - x.amax((1, -1)).sum(1)[:, None, None, None],
    "greatest of batches": lambda x: x.amax(0) + x.amax(),
    "windows": lambda x: x.unfold(2, 3, 2).unfold(3, 2, 1).sum((4, 5)),
    "windows of channels": lambda x: x.unfold(1, 4, 4).flatten(1, 2),
    "every second": lambda x: x[:, 1::2, ::2, ::3],
    "every fourth": lambda x: x[:, :, 1:6:4, 2::4],
    "avg_pool2d without padding in the mean": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "adaptive pool": lambda x: F.adaptive_avg_pool2d(x, (3, 2)),
    "adaptive pool of single pixels": lambda x: F.adaptive_avg_pool2d(x, 6) * 2,
    "adaptive pool that does not divide": lambda x: F.adaptive_avg_pool2d(x, 4),
    "clamp": lambda x: x.clamp(-1, 2) + x.clamp(min=0.5) + x.clamp_max(1.0),
    "clamp by tensors": lambda x: x.clamp(min=x.mean()),
    "squeeze": lambda x: x.mean((2, 3), keepdim=True).squeeze(3).squeeze(),
    "unsqueeze": lambda x: x.unsqueeze(0).unsqueeze(2),
    "split": lambda x: torch.cat([p * i for i, p in enumerate(x.split([3, 1, 4], 1), 1)], 1),
    "chunk": lambda x: x.chunk(3, 1)[2] - x.chunk(3, -1)[0].sum(),
    "unbind": lambda x: torch.stack([p * i for i, p in enumerate(x.unbind(1), 1)]).sum(0) + x.unbind(-1)[2].sum(),
    "unflatten": lambda x: x.unflatten(1, (2, 4)).flatten(2),
    "numbers": lambda x: 1 - (2 * x + 3 - 0.5) / 4 + x * 0.1,
    "integers stay": lambda x: x[:, : x.shape[1] // 2] * 2,
    "mean of two dimensions": lambda x: x.mean((1, 3), keepdim=True) * x,
    "mean of the last": lambda x: x.mean(-1),
    "mean over the batch": lambda x: x.mean(0),
    "sum of images": lambda x: x.sum((2, 3)),
    "sum of the last": lambda x: x.sum(-1, keepdim=True),
    "sum of two": lambda x: x.unflatten(1, (2, 4)).sum(1),
    "sum of channels": lambda x: x - x.sum(1, keepdim=True),
    "vector norm": lambda x: F.normalize(x, dim=1),
    "vector norm of the last": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "softmax over channels": lambda x: x.softmax(1),
    "softmax over channels, then a view": lambda x: x.softmax(1).view(x.shape[0], -1),
    "resized, then a view": lambda x: F.interpolate(x, (9, 4)).permute(0, 2, 3, 1).permute(0, 3, 1, 2).view(-1, 8 * 36),
    "cubic, then a view": lambda x: F.interpolate(x, (8, 5), mode="bicubic").view(x.shape[0], -1),
    "nearest of an infinite image": lambda x: F.interpolate(x.masked_fill(x > 1, -torch.inf), (3, 3)).clamp_min(-9.0),
    "cubic of integers": lambda x: x * F.interpolate((x.detach() * 9).to(torch.uint8), (6, 6), mode="bicubic").float(),
    "a scalar expanded for a product": lambda x: x.half() * torch.ones(()).expand(6),
    "stack": lambda x: torch.stack([x, x * 2], 1).flatten(1, 2),
    "stack at the end": lambda x: torch.stack([x, x * 2, x - 1], -1),
    "roll": lambda x: x.roll((1, -2), (2, 3)),
    "roll over the batch": lambda x: x.roll(1, 0),
    "roll of all": lambda x: x.roll(3),
    "reflection": lambda x: F.pad(x, (1, 2, 3, 0), mode="reflect"),
    "edges": lambda x: F.pad(x, (1, 2, 3, 0), mode="replicate"),
    "other side": lambda x: F.pad(x, (1, 2, 3, 0), mode="circular"),
    "doubled": lambda x: F.interpolate(x, scale_factor=2.0),
    "nearest of another size": lambda x: F.interpolate(x, (9, 4)),
    "nearest exact": lambda x: F.interpolate(x, (9, 12), mode="nearest-exact"),
    "shrunk": lambda x: F.interpolate(x, scale_factor=0.5),
    "cubic": lambda x: F.interpolate(x, (8, 5), mode="bicubic"),
    "expanded for a product": lambda x: x * x.mean((2, 3), keepdim=True).expand_as(x),
    "expanded for a copy": lambda x: torch.cat([x, x.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6)], 1),
    "one tensor joined": lambda x: torch.cat([x], 1) * 2.0,
}


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.scale, self.function = nn.Parameter(torch.ones(8, 1, 1)), function

    def forward(self, x):
        return self.function(x * self.scale)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic batch"])
def test_function_and_gradients_stay(name, dynamic):
    model = Function(FUNCTIONS[name])
    graph = qf.export(model, (IMAGE,), dynamic_batch=dynamic).module()
    rewritten = rewrite(copy.deepcopy(graph), REWRITES)
    x = torch.randn(5, 8, 6, 6) if dynamic else IMAGE
    for expected, ours in ((model, rewritten), (graph, rewritten)):
        assert torch.allclose(expected(x), ours(x), rtol=1e-5, atol=1e-5)
    model.zero_grad()
    for network in (model, rewritten):
        network(x).square().sum().backward()
    gradient = rewritten.get_parameter("scale").grad
    assert torch.allclose(gradient, model.scale.grad, rtol=1e-4, atol=1e-3)
    assert all("val" in n.meta for n in rewritten.graph.nodes if n.op == "call_function")
    assert rewrite(copy.deepcopy(rewritten), REWRITES).code == rewritten.code  # done once, all is done


@pytest.mark.parametrize(
    "name",
    [
        "silu",
        "hardsigmoid",
        "mean",
        "avg_pool2d",
        "avg_pool2d whose ceiling adds no window",
        "avg_pool2d with a divisor",
        "adaptive pool that does not divide",
        "greatest of images",
        "windows of channels",
        "split",
        "squeeze",
        "fold",
        "one tensor joined",
        "stack",
        "roll",
        "reflection",
        "doubled",
        "cubic",
        "sum of images",
        "expanded for a product",
    ],
)
def test_what_the_backend_lacks_is_gone(name):
    graph = qf.export(Function(FUNCTIONS[name]), (IMAGE,)).module()
    before = {op(n) for n in graph.graph.nodes}
    rewritten = rewrite(copy.deepcopy(graph), REWRITES)
    lacking = ("silu", "hardsigmoid", "avg_pool", "split", "squeeze", "im2col", "col2im", "unfold", "amax", "adaptive")
    lacking += ("stack", "roll", "pad", "upsample", "norm", "sum", "expand")
    assert not any(word in str(op(n)) for n in rewritten.graph.nodes for word in lacking)
    assert {op(n) for n in rewritten.graph.nodes} != before


def test_rewriting_adds_nothing_to_checkpoints():
    model = Function(F.hardsigmoid)
    graph = rewrite(qf.export(model, (IMAGE,)).module(), REWRITES)
    assert graph.state_dict().keys() == model.state_dict().keys()


def test_plan_leaves_the_graph_as_it_was():
    graph = qf.export(Function(F.silu), (IMAGE,)).module()
    code = graph.code
    assert "sigmoid" in str(XNNPACKQuantizer().plan(graph))
    assert graph.code == code
    assert "silu" in str(RuleQuantizer().plan(graph))


class Clamped(nn.Module):
    def __init__(self, low, high):
        super().__init__()
        self.conv, self.act = nn.Conv2d(8, 4, 1), nn.Hardtanh(low, high, inplace=True)

    def forward(self, x):
        return self.act(self.conv(x))


@pytest.mark.parametrize(("low", "high", "gone"), [(0.0, 6.0, True), (-0.2, 0.1, True), (0.5, 2.0, False)])
def test_a_clamp_that_quantizing_does_anyway_is_dropped(low, high, gone):
    graph = qf.export(Clamped(low, high), (IMAGE,)).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [IMAGE], progress=False)
    converted = qf.convert(prepared)
    assert any("hardtanh" in str(n.target) for n in converted.graph.nodes) is not gone
    assert low - 0.02 <= converted(IMAGE * 5).min() <= converted(IMAGE * 5).max() <= high + 0.02
    assert sqnr(graph(IMAGE).detach(), converted(IMAGE).detach()) > 25


@pytest.mark.parametrize(("act", "low", "high"), [(F.hardswish, -3.0, None), (torch.sigmoid, -8.0, 8.0)])
def test_no_level_goes_to_what_the_activation_ignores(act, low, high):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return act(self.conv(x) * 1.0)

    model, x = Net(), IMAGE * 20
    graph = qf.export(model, (x,)).module()
    prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
    mul = next(n for n in prepared.graph.nodes if op(n) is torch.ops.aten.mul.Tensor)
    observer = prepared.get_submodule(next(iter(mul.users)).target)
    assert observer.min_val >= low
    assert high is None or observer.max_val <= high
    assert sqnr(model(x).detach(), qf.convert(prepared)(x).detach()) > 20


def test_an_image_without_a_batch_is_left():
    class Resized(nn.Module):
        def forward(self, x):
            return F.interpolate(x.unsqueeze(0), scale_factor=2.0).squeeze(0)

    graph = qf.export(
        Resized(), (torch.randn(2, 4, 4),), dynamic_shapes=({0: torch.export.Dim("rows", min=1)},)
    ).module()
    x = torch.randn(3, 4, 4)
    assert torch.equal(rewrite(copy.deepcopy(graph), REWRITES)(x), graph(x))
