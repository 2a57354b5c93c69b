"""Folding batch norm keeps the function, whatever shares the convolution."""

import copy

import pytest
import torch
from networks import norm_networks, randomize_statistics

import quantflow as qf
from quantflow.graph.aten import op
from quantflow.graph.batch_norm import fold_batch_norm, norm_as_convolution
from quantflow.graph.modes import BATCH_NORM

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
