"""Rewrites: the same function and gradients in float, for any batch, and none of the operators that a backend lacks."""

import copy

import pytest
import torch
import torch.utils._pytree as pytree
from networks import sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.aten import op
from quantflow.delegates.portable_lacks import PORTABLE_LACKS
from quantflow.graph.rewrites import PRODUCT_REWRITES, REWRITES, VOLUME_REWRITES, rewrite
from quantizers import RuleQuantizer, XNNPACKQuantizer

IMAGE = torch.randn(3, 8, 6, 6) * 3
VOLUME = torch.randn(2, 3, 4, 5, 5)
TABLES = ({**REWRITES, **VOLUME_REWRITES, **PRODUCT_REWRITES}, PORTABLE_LACKS)

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
        "split",
        "squeeze",
        "fold",
        "one tensor joined",
    ],
)
def test_what_the_backend_lacks_is_gone(name):
    graph = qf.export(Function(FUNCTIONS[name]), (IMAGE,)).module()
    before = {op(n) for n in graph.graph.nodes}
    rewritten = rewrite(copy.deepcopy(graph), REWRITES)
    lacking = ("silu", "hardsigmoid", "avg_pool", "split", "squeeze", "im2col", "col2im")
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


# Operators that make a new tensor, which a view of their input, or the input itself, equals.
NEW = {
    "average of single pixels": lambda h: F.adaptive_avg_pool2d(h, 6),
    "maximum of single pixels": lambda h: F.adaptive_max_pool2d(h, 6),
    "maximum of single places": lambda h: F.adaptive_max_pool1d(h.flatten(0, 1), 6),
    "maximum of single voxels": lambda h: F.adaptive_max_pool3d(h, 6),
    "pad that cuts off": lambda h: F.pad(h, (-1, -1)),
    "one tensor joined": lambda h: torch.cat([h]),
    "one view joined": lambda h: torch.cat([h[:, :2]]),
    "median of one": lambda h: torch.median(h[..., :1], -1)[0],
}


def write_new(make, x):
    y = make(x)
    return y.neg_()


def write_new_read_old(make, x):
    h = x * 2
    y = make(h)
    return h + 0, y.neg_(), h


def write_old_read_new(make, x):
    h = x * 2
    y = make(h)
    h.neg_()
    return y


def write_a_view(make, x):
    h = x * 2
    y = make(h)
    h[..., 0].add_(1)
    return h.sum(), y * 2


def return_both(make, x):
    h = x * 2
    return h, make(h), make(x)


def view(make, x):
    return make(x * 2).view(-1) * 2


@pytest.mark.parametrize("use", [write_new, write_new_read_old, write_old_read_new, write_a_view, return_both, view])
@pytest.mark.parametrize("name", NEW)
def test_what_is_made_anew_is_not_shared(name, use):
    """Neither with what is written nor, before the caller, with an input or another output."""

    class Model(nn.Module):
        def forward(self, x):
            return use(NEW[name], x)

    given = IMAGE.clone()
    expected = Model()(given)
    graph = torch.export.export(Model(), (IMAGE.clone(),)).module()
    for table in TABLES:
        x = IMAGE.clone()
        found = rewrite(copy.deepcopy(graph), table)(x)
        torch.testing.assert_close((found, x), (expected, given))
        memories = [
            len({t.untyped_storage().data_ptr() for t in pytree.tree_leaves(tensors)})
            for tensors in ((found, x), (expected, given))
        ]
        assert memories[0] == memories[1]


KERNEL, POSITIONS = torch.randn(4, 3, 3, 3, 3), torch.randn(1, 4, 4, 5, 5)
PLACES = torch.tensor([1, 2, 5, 2, 3, 4])
INTEGERS = torch.randint(-9, 9, (2, 3, 4, 4))
# Where a rewrite is another than elsewhere, or none; the dimension that varies, where one does.
BOUNDARIES = {
    "channels that vary": (lambda x: F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 3), IMAGE, 1),
    "a number beyond float32": (lambda x: x * 1e39 - x * 1e-42, IMAGE, None),
    "numbers beyond float16": (lambda x: x * 1e5 + x * 1e-8, IMAGE.half() / 1e3, None),
    "maxima of no window": (lambda x: F.adaptive_max_pool2d(x, (0, 2)), IMAGE, None),
    "maxima within padding": (
        lambda x: F.max_pool3d(x, 2, 1, 1, 3, return_indices=True),
        torch.randn(1, 1, 2, 2, 2),
        None,
    ),
    "no volume": (
        lambda x: F.conv_transpose3d(x, KERNEL.transpose(0, 1), padding=(3, 0, 0)),
        VOLUME,
        None,
    ),
    "no batch": (lambda x: F.max_pool3d(F.conv3d(x, KERNEL), 2), VOLUME[:0], None),
    "bags of nothing": (
        lambda x: F.embedding_bag(torch.zeros(0, dtype=torch.long), x, torch.zeros(2, dtype=torch.long), mode="max"),
        IMAGE[0, 0],
        None,
    ),
    "bags that end before their indices, padded": (
        lambda x: F.embedding_bag(PLACES, x, torch.tensor([0, 2, 4]), include_last_offset=True, padding_idx=2),
        IMAGE[0, 0],
        None,
    ),
    "bags that end before their indices": (
        lambda x: F.embedding_bag(PLACES, x, torch.tensor([0, 2, 4]), include_last_offset=True, mode="sum"),
        IMAGE[0, 0],
        None,
    ),
    "bags that end before their indices, float64": (
        lambda x: F.embedding_bag(PLACES, x, torch.tensor([0, 2, 4]), include_last_offset=True, mode="sum"),
        IMAGE[0, 0].double(),
        None,
    ),
    "bags of infinite rows": (
        lambda x: F.embedding_bag(PLACES, 1 / x.relu(), torch.tensor([0, 1, 4]), mode="sum"),
        IMAGE[0, 0],
        None,
    ),
    "sorted truths": (lambda x: torch.sort(x > 0, 1, descending=True)[0], IMAGE, None),
    "places of sorted values": (lambda x: torch.argsort(x, 1, descending=True), IMAGE, None),
    "volumes with positions": (lambda x: F.conv3d(x, KERNEL, padding=1) + POSITIONS, VOLUME, None),
    "volumes with positions, any batch": (lambda x: F.conv3d(x, KERNEL, padding=1) + POSITIONS, VOLUME, 0),
    "hardsigmoid of a number": (lambda x: F.hardsigmoid(x.mean()), IMAGE, None),
    "decimals of a number": (lambda x: torch.round(x.sum(), decimals=2), IMAGE, None),
    "whole averages": (lambda x: F.avg_pool2d(x, 2), INTEGERS, None),
    "whole averages over volumes": (lambda x: F.avg_pool3d(x, 2), INTEGERS, None),
}


@pytest.mark.parametrize("name", BOUNDARIES)
def test_boundaries(name):
    function, x, varies = BOUNDARIES[name]

    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    dynamic = None if varies is None else ({varies: torch.export.Dim.DYNAMIC},)
    graph = torch.export.export(Model(), (x,), dynamic_shapes=dynamic).module()
    for table in TABLES:
        torch.testing.assert_close(rewrite(copy.deepcopy(graph), table)(x), function(x))


def test_positions_are_added_to_any_batch():
    """Also where the graph was captured with a batch of one, as they have."""
    model = nn.Conv3d(3, 4, 3, padding=1)
    model.register_buffer("positions", POSITIONS)
    model.register_forward_hook(lambda m, args, out: out + m.positions)
    graph = rewrite(qf.export(model, (VOLUME[:1],)).module(), VOLUME_REWRITES)
    assert torch.allclose(graph(VOLUME), model(VOLUME), atol=1e-5)


def test_a_rewrite_that_fails_leaves_its_node():
    model = nn.Conv3d(3, 4, 3, padding=1)
    graph = qf.export(model, (VOLUME,)).module()
    code, weight = graph.code, graph.get_parameter("weight")

    def fails(module, node):
        assert VOLUME_REWRITES[op(node)](module, node) is not None
        raise ValueError("no")

    with pytest.warns(qf.QuantflowWarning, match=r"conv3d.*stays: ValueError: no"):
        rewrite(graph, {torch.ops.aten.conv3d.default: fails})
    graph.recompile()
    assert graph.code == code
    assert graph.get_parameter("weight") is weight
    assert graph.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(graph(VOLUME), model(VOLUME))


MOVES = {
    "unsqueeze": lambda x: x.unsqueeze(0),
    "unsqueeze and back": lambda x: torch.relu(x.unsqueeze(0)).squeeze(0) + 1,
    "squeeze": lambda x: x.unsqueeze(1).unsqueeze(0).squeeze((0, 2)),
    "permuted": lambda x: x.permute(1, 2, 3, 0).unsqueeze(2),
    "select": lambda x: x.transpose(0, 1)[2] + x.movedim(0, -1)[2].movedim(-1, 0),
    "unbind": lambda x: torch.stack([p * 2 for p in x.transpose(0, 1).unbind(0)], 1),
    "unflatten": lambda x: x.unflatten(1, (2, 4)).transpose(0, 2).unflatten(1, (2, 1)).unsqueeze(1),
    "rows of a table": lambda x: F.embedding((x > 0).long(), KERNEL[0, 0, 0]).unsqueeze(0),
    "one hot": lambda x: F.one_hot((x > 0).long(), 2).unsqueeze(2) * 1.0,
    "mean": lambda x: x.permute(1, 2, 3, 0).mean(1).unsqueeze(0),
    "without the batch": lambda x: (x.sum(0) * 0 + 1).unsqueeze(1) + x[:1].squeeze(0).unsqueeze(1),
}


@pytest.mark.parametrize("name", MOVES)
def test_another_batch_than_that_of_the_example(name):
    class Model(nn.Module):
        def forward(self, x):
            return MOVES[name](x)

    graph = rewrite(qf.export(Model(), (IMAGE,)).module(), REWRITES)
    assert not {op(n) for n in graph.graph.nodes} & {torch.ops.aten.unsqueeze.default, torch.ops.aten.select.int}
    for batch in (1, 3, 5):
        x = torch.randn(batch, 8, 6, 6)
        torch.testing.assert_close(graph(x), MOVES[name](x))
