"""Folding batch norm keeps the function, whatever shares the convolution."""

import copy

import pytest
import torch
from networks import norm_networks, randomize_statistics

import quantflow as qf
from quantflow.aten import op
from quantflow.batch_norm import fold_batch_norm
from quantflow.modes import BATCH_NORM

NETWORKS = norm_networks()
# Where the norm can't go: nothing before it, statistics of the batch, channels elsewhere, or another user.
UNFOLDED = {"bn_alone": 1, "conv_bn_no_statistics": 1, "linear_3d_bn": 1, "conv_two_users": 1}


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
