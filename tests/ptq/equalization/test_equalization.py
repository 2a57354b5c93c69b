"""Equalization: the function in float stays, ranges become alike, and what was badly scaled is won back."""

import copy

import pytest
import torch
from networks import ConvNet, randomize_statistics, sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf
from quantflow.graph.aten import CONVOLUTIONS, LINEARS, argument, op
from quantflow.graph.parameters import tensor_of
from quantflow.ptq import equalize
from quantflow.ptq.channel_scaling import divide_outputs, multiply_inputs
from quantflow.ptq.equalization.channel_groups import channel_groups
from quantizers import XNNPACKQuantizer


class Branches(nn.Module):
    """Two layers whose sum is read by one, and a term that comes round."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 6, 1, bias=False)
        self.inner, self.head = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        y = F.relu(self.first(x) + self.second(x))
        return self.head(y + self.inner(y))


class Gated(nn.Module):
    """Squeeze and excite: channels times a gate that reads their means."""

    def __init__(self):
        super().__init__()
        self.conv, self.gate, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        y = F.relu(self.conv(x))
        return self.head(y * torch.sigmoid(self.gate(y.mean((2, 3), keepdim=True))) * 0.5)


class Met(nn.Module):
    """What a scale does not pass: an input added, a concatenation, an output, a smooth activation."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 1) for _ in range(4))

    def forward(self, x):
        y = self.b(self.a(x) + x)
        z = self.c(F.silu(y))
        return self.d(z), z


IMAGE, LINE = torch.randn(8, 3, 9, 9), torch.randn(8, 3, 17)
# Each with the number of groups whose channels can be scaled.
NETWORKS = {
    "relu": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 3)), IMAGE, 1),
    "leaky": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.2), nn.Conv2d(8, 4, 3, groups=2)), IMAGE, 1),
    "prelu": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 4, 3)), IMAGE, 1),
    "depthwise": (
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
        IMAGE,
        2,
    ),
    "pools, flatten, linear": (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, padding="same"),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.AvgPool2d(2, padding=1),
            nn.ZeroPad2d(1),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(8 * 25, 4),
        ),
        IMAGE,
        1,
    ),
    "mean, linear": (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
        IMAGE,
        1,
    ),
    "conv1d": (nn.Sequential(nn.Conv1d(3, 8, 3), nn.ReLU(), nn.Conv1d(8, 4, 3, bias=False)), LINE, 1),
    "linear over places": (nn.Sequential(nn.Linear(17, 9), nn.ReLU(), nn.Linear(9, 5)), LINE, 1),
    "batch norm": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3)), IMAGE, 1),
    "branches": (Branches(), IMAGE, 1),
    "gated": (Gated(), IMAGE, 1),
    "met": (Met(), IMAGE, 0),
    "relu6": (nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU6(), nn.Conv2d(8, 4, 3)), IMAGE, 0),
}


def captured(model, x):
    torch.manual_seed(1)
    randomize_statistics(model)
    for parameter in model.parameters():
        if parameter.ndim > 1:  # rows of very unlike size
            parameter.data *= torch.exp(1.5 * torch.randn(len(parameter), *[1] * (parameter.ndim - 1)))
    return qf.export(model.eval(), (x,), dynamic_batch=True).module()


def weights(graph):
    layers = [n for n in graph.graph.nodes if op(n) in CONVOLUTIONS | LINEARS]
    return [tensor_of(graph, argument(n, "weight")).detach() for n in layers]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_function_stays_and_the_channels_move(name):
    model, x, groups = NETWORKS[name]
    graph = captured(copy.deepcopy(model), x)
    before = {k: v.clone() for k, v in graph.state_dict().items()}
    for data in (None, [x]):
        if groups:
            found = equalize(graph, data)
        else:
            with pytest.warns(qf.QuantflowWarning, match="stays as it is"):
                found = equalize(graph, data)
        with torch.no_grad():
            expected, got = graph(x), found(x)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert len(channel_groups(found)) == groups
        if "norm" not in name:
            moved = [not torch.allclose(a, b, rtol=0.05) for a, b in zip(weights(graph), weights(found), strict=True)]
            assert all(moved) if groups else not any(moved)
    assert all(torch.equal(before[k], v) for k, v in graph.state_dict().items()), "the graph was to be left as it was"


def test_without_data_a_channel_is_made_as_large_as_it_is_read_whatever_it_was_before():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    graph = captured(model, IMAGE)
    scale = torch.exp(2 * torch.randn(8))
    model[0].weight.data *= scale.reshape(-1, 1, 1, 1)
    model[0].bias.data *= scale
    model[2].weight.data /= scale.reshape(-1, 1, 1, 1)
    planted = qf.export(model, (IMAGE,), dynamic_batch=True).module()
    first, other = (weights(equalize(g)) for g in (graph, planted))
    for a, b in zip(first, other, strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0)
    made, between, read = first
    assert torch.allclose(made.flatten(1).abs().amax(1), between.flatten(1).abs().amax(1), rtol=0.02)
    assert torch.allclose(between.flatten(1).abs().amax(1), read.abs().amax((0, 2, 3)), rtol=0.02)


def test_with_data_the_channels_of_what_a_depthwise_layer_reads_fill_its_range():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
    graph = captured(model, IMAGE)
    found = equalize(graph, [IMAGE])
    with torch.no_grad():
        unlike, alike = (F.relu(F.conv2d(IMAGE, *list(g.parameters())[:2])).amax((0, 2, 3)) for g in (graph, found))
    assert unlike.max() > 10 * unlike.min()
    assert alike.max() < 1.05 * alike.min()
    assert torch.isclose(alike.max(), unlike.max(), rtol=1e-3)


def test_a_channel_that_can_never_reach_a_clamp_is_scaled_and_no_other():
    model = nn.Sequential(nn.ReLU6(), nn.Conv2d(3, 8, 1), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    torch.manual_seed(0)
    with torch.no_grad():
        model[1].weight.uniform_(0.9, 1.1)
        model[1].weight[:3] *= 0.02  # at most 6·3·0.022
        model[1].bias.zero_()
    x = 100 * torch.randn(64, 3, 5, 5)
    graph = qf.export(model, (x,), dynamic_batch=True).module()
    for data in (None, [x]):
        found = equalize(graph, data)
        assert torch.allclose(found(x), graph(x), rtol=1e-4, atol=1e-4)
        moved = ~torch.isclose(weights(found)[0], weights(graph)[0], rtol=0.05).flatten(1).all(1)
        assert moved.tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize("name", ["relu", "depthwise", "branches", "gated", "pools, flatten, linear"])
def test_what_was_badly_scaled_is_won_back(name):
    model, x, _ = NETWORKS[name]
    graph = qf.export(model.eval(), (x,), dynamic_batch=True).module()
    bad = copy.deepcopy(graph)
    for group in channel_groups(bad):
        scale = torch.exp(1.3 * torch.randn(len(group.fixed))).double()
        for layer in group.makers:
            divide_outputs(bad, layer, scale)
        for layer in group.readers:
            multiply_inputs(bad, layer, scale.repeat_interleave(group.tensors[layer.args[0]].repeat))
    expected = graph(x)
    assert torch.allclose(bad(x), expected, rtol=1e-4, atol=1e-4)

    def quality(g):
        prepared = qf.prepare(g, XNNPACKQuantizer())
        return sqnr(expected, qf.convert(qf.calibrate(prepared, [x], progress=False))(x))

    found = quality(equalize(bad, [x]))
    assert found > quality(bad) + 3
    assert found > quality(graph) - 3


def test_bad_input_names_stage_and_remedy():
    model, x, _ = NETWORKS["relu"]
    graph = qf.export(model, (x,), dynamic_batch=True).module()
    for bad, data, words in (
        (model, None, "no captured graph"),
        (qf.prepare(graph, XNNPACKQuantizer()), None, "prepared already"),
        (graph, [], "no data"),
        (graph, [torch.randn(8, 5)], "shape"),
        (graph, x, "no iterable"),
    ):
        with pytest.raises(qf.QuantflowError, match=words) as raised:
            equalize(bad, data)
        assert raised.value.stage == "equalize"
        assert raised.value.remedy


def test_a_network_without_a_pair_says_so():
    x = torch.randn(2, 3, 16, 16)
    graph = qf.export(randomize_statistics(ConvNet()).eval(), (x,)).module()
    with pytest.warns(qf.QuantflowWarning, match="relu6"):
        equalize(graph)
