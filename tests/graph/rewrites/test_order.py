"""Maxima, medians, sorting and decimals on the float path."""

import pytest
import torch
from float_path import Function, same
from torch import nn
from torch.nn import functional as F

import quantflow as qf

IMAGE = torch.randn(2, 4, 7, 9)


def test_core_aten_has_a_form_of_what_torch_does_not_decompose():
    core = qf.export(nn.AdaptiveMaxPool2d((3, 4)), (IMAGE,)).to_core_aten()
    assert torch.equal(core.module()(IMAGE), F.adaptive_max_pool2d(IMAGE, (3, 4)))
    assert "adaptive_max_pool2d" in str(core.source.graph)


ORDERS = {
    "adaptive maximum": (nn.AdaptiveMaxPool2d((3, 4)), IMAGE),
    "adaptive maximum that divides": (nn.AdaptiveMaxPool2d((7, 3), return_indices=True), IMAGE),
    "adaptive maximum and its place": (nn.AdaptiveMaxPool2d((4, None), return_indices=True), IMAGE),
    "adaptive maximum of rows": (nn.AdaptiveMaxPool1d(4), IMAGE[0]),
    "median": (Function(torch.median), IMAGE[0, 0]),
    "median of rows": (Function(lambda x: x.median(1)), IMAGE),
    "median with NaN": (
        Function(lambda x: x.median(0).values),
        torch.tensor([[1.0, float("nan")], [2.0, 3.0], [0.0, 1.0]]),
    ),
    "median of integers": (Function(lambda x: x.median(-1).values), torch.randint(0, 50, (4, 6))),
    "sorted truths and places": (Function(lambda x: (torch.sort(x > 0)[0], torch.argsort(x))), IMAGE),
    "sorted": (Function(lambda x: tuple(x.sort(1, descending=True))), IMAGE),
    "two decimals": (Function(lambda x: x.round(decimals=2)), IMAGE),
    "tens": (Function(lambda x: (x * 100).round(decimals=-1)), IMAGE),
}


@pytest.mark.parametrize("name", ORDERS)
def test_maxima_medians_and_decimals(name):
    model, x = ORDERS[name]
    assert same(model, x)
