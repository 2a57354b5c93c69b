"""Batch norms on the float path: folded right, or run within the delegate."""

import copy

import pytest
import torch
from float_path import lowered, same
from networks import norm_networks, randomize_statistics, sqnr
from torch import nn
from torch.nn import functional as F

import quantflow as qf

VOLUME = torch.randn(2, 4, 5, 6, 7)
IMAGE = torch.randn(2, 4, 7, 9)


class TwoNorms(nn.Module):
    """One convolution called twice, before norms of its own each."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.first, self.second = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.first(self.conv(x)) + self.second(self.conv(x * 0.5))


class OneConvolutionBetween(nn.Module):
    """A convolution before a norm, and the same weights without one."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) - self.conv(x)


NORMS = {
    "one convolution, two norms": (TwoNorms, IMAGE),
    "one convolution with and without": (OneConvolutionBetween, IMAGE),
    "linear over rank 3": (lambda: nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(7)), IMAGE[0]),
    "norm behind norm": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)), IMAGE),
    "rows": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm1d(7, affine=False)), IMAGE[0, 0].T),
    "volumes": (lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm3d(4)), VOLUME),
    "statistics of the batch": (lambda: nn.BatchNorm2d(4, track_running_stats=False), IMAGE),
}


@pytest.mark.parametrize("name", NORMS)
def test_batch_norms_are_folded_right(name):
    build, x = NORMS[name]
    assert same(randomize_statistics(build()), x)


@pytest.mark.parametrize(
    "name", ["conv_bn", "shared_conv", "transposed_groups_bn", "conv_two_users", "convnet", "linear_bn"]
)
def test_norms_run_within_the_delegate(name):
    model, x = norm_networks()[name]
    model = randomize_statistics(copy.deepcopy(model))
    program = lowered(model, x)
    assert not any("batch_norm" in op for op in (program.delegation.delegated | program.delegation.portable))
    assert sqnr(model.eval()(x), program(x)) > 60


def test_norms_of_a_program_that_comes_in_decomposed():
    model = randomize_statistics(TwoNorms()).eval()
    core = torch.export.export(model, (IMAGE,)).run_decompositions()
    program = qf.export(core).to_core_aten().to_edge("xnnpack").to_executorch()
    assert program.delegation.fraction == 1.0
    assert sqnr(model(IMAGE), program(IMAGE)) > 60


class OwnStatistics(nn.Module):
    """A norm by a mean that the program itself keeps."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))

    def forward(self, x):
        self.mean.mul_(0.5).add_(x.mean((0, 2, 3)), alpha=0.5)
        return F.batch_norm(x, self.mean, self.var)


def test_a_norm_by_statistics_that_change_is_not_frozen():
    model = OwnStatistics().eval()
    program = lowered(copy.deepcopy(model), IMAGE + 1)
    for x in (IMAGE + 1, IMAGE - 3):
        assert torch.allclose(program(x), model(x), atol=1e-4)
