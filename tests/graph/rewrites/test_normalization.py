"""Norms over their own statistics keep their precision where the mean is large beside the deviation."""

import copy

import pytest
import torch
from torch import nn

import quantflow as qf
from quantflow.graph.rewrites import NORMALIZATION_REWRITES, rewrite
from quantflow.metrics import signal_to_noise
from quantizers import XNNPACKQuantizer

IMAGES, ROWS = (torch.randn(5, 8, 6, 6, generator=torch.Generator().manual_seed(i)) for i in range(2))
NORMS = {
    "batch norm": (nn.BatchNorm2d(8, track_running_stats=False), IMAGES),
    "batch norm of rows": (nn.BatchNorm1d(8, track_running_stats=False), ROWS[:, :, 0, 0]),
    "instance norm": (nn.InstanceNorm2d(8, affine=True), IMAGES),
    "instance norm of signals": (nn.InstanceNorm1d(8), IMAGES.flatten(2)),
    "layer norm": (nn.LayerNorm([6, 6]), IMAGES),
    "group norm": (nn.GroupNorm(2, 8), IMAGES),
    "group norm of rows": (nn.GroupNorm(2, 8), ROWS[:, :, 0, 0]),
}


def randomized(norm):
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)
    return norm.eval()


@pytest.mark.parametrize("delegate", ["xnnpack", None])
@pytest.mark.parametrize("name", NORMS)
@pytest.mark.filterwarnings("ignore:.edge.*the mean is subtracted before the norm")
def test_a_large_mean_costs_no_precision(name, delegate):
    norm, x = NORMS[name]
    x = x + 1000
    wanted = randomized(norm).double()(x.double()).float().detach()
    program = qf.export(norm.float(), (x,)).to_core_aten().to_edge(delegate).to_executorch()
    assert signal_to_noise(wanted, program(x)) > 65


def test_a_norm_is_centered_only_where_the_check_fails():
    norm, x = NORMS["layer norm"]
    edge = qf.export(randomized(norm), (x,)).to_core_aten().to_edge()
    assert "aten::sub.Tensor" not in edge.to_executorch().delegation.portable
    with pytest.warns(qf.QuantflowWarning, match="layer_norm.*the mean is subtracted"):
        program = qf.export(norm, (x + 1000,)).to_core_aten().to_edge().to_executorch()
    assert program.delegation.portable["aten::sub.Tensor"] == 1


@pytest.mark.parametrize("name", ["instance norm", "group norm", "group norm of rows"])
def test_norms_of_images_stay_in_the_delegate(name):
    norm, x = NORMS[name]
    program = qf.export(randomized(norm), (x,)).to_core_aten().to_edge("xnnpack").to_executorch()
    assert (program.delegation.calls, program.delegation.fraction) == (1, 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["batch norm", "instance norm", "group norm"])
def test_half_precision_keeps_float_statistics(name, dtype):
    norm, x = NORMS[name]
    norm, x = randomized(copy.deepcopy(norm)).to(dtype), (x * 1000).to(dtype)
    graph = qf.export(norm, (x,)).module()
    rewrite(graph, NORMALIZATION_REWRITES)
    found, wanted = graph(x), norm(x)
    assert found.dtype == dtype
    assert signal_to_noise(wanted.float().detach(), found.float().detach()) > 40


def test_a_batch_without_examples_is_planned():
    graph = qf.export(nn.GroupNorm(2, 8), (torch.randn(0, 8, 4, 4),)).module()
    assert XNNPACKQuantizer().plan(graph).calls is not None
