"""Rewrites share no memory that the operators do not share, where it could be seen."""

import copy

import pytest
import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.nn import functional as F

from quantflow.delegates.portable_rewrites import PORTABLE_REWRITES
from quantflow.graph.rewrites import PRODUCT_REWRITES, REWRITES, VOLUME_REWRITES, rewrite

IMAGE = torch.randn(3, 8, 6, 6) * 3
TABLES = ({**REWRITES, **VOLUME_REWRITES, **PRODUCT_REWRITES}, PORTABLE_REWRITES)

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


@pytest.mark.parametrize("function", [F.hardsigmoid, F.hardswish, F.silu, F.mish, F.softsign, F.relu6])
@pytest.mark.parametrize("write", [torch.Tensor.tanh_, lambda y: y[:, :2].neg_()])
def test_what_is_written_in_place_has_a_gradient(function, write):
    """Autograd keeps the results of some operators that rewrites write."""

    class Model(nn.Module):
        def forward(self, x):
            y = function(x * 1.5)
            write(y)
            return y * y

    x = IMAGE.clone().requires_grad_()
    graph = rewrite(torch.export.export(Model(), (IMAGE.clone(),)).module(), TABLES[0])
    (expected,) = torch.autograd.grad(Model()(x).sum(), x)
    (found,) = torch.autograd.grad(graph(x).sum(), x)
    torch.testing.assert_close(found, expected)
