"""Rewrites of norms over their own statistics, whose portable kernels compute a variance as ``E[x²] - E[x]²``.

That difference loses the digits of the variance where the mean is large: with a mean of 1,000 standard deviations the result
has 24 dB. These rewrites subtract the mean first.
"""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, value
from quantflow.graph.parameters import tensor_of
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, constant_before, tensor_before


def batch_norm(module: GraphModule, node: Node) -> Node | None:
    """Write a batch norm without running statistics as arithmetic."""
    x = value(node)
    if argument(node, "running_mean") is not None or x is None or x.ndim < 2:
        return None
    return _normalized(module, node, [0, *range(2, x.ndim)])


def instance_norm(module: GraphModule, node: Node) -> Node | None:
    """Write an instance norm without running statistics as arithmetic."""
    x = value(node)
    if argument(node, "running_mean") is not None or x is None or x.ndim < 3:
        return None
    return _normalized(module, node, list(range(2, x.ndim)))


def _normalized(module: GraphModule, node: Node, dims: list[int]) -> Node:
    """The input of ``node`` normalized over ``dims``, then scaled and shifted per channel."""
    x, result = argument(node, "input"), value(node)
    assert result is not None
    centered = call_before(node, aten.sub.Tensor, x, call_before(node, aten.mean.dim, x, dims, True))
    squares = call_before(node, aten.mul.Tensor, centered, centered)
    variance = call_before(node, aten.mean.dim, squares, dims, True)
    eps = constant_before(module, node, argument(node, "eps"), (1,) * result.ndim)
    scale = call_before(node, aten.rsqrt.default, call_before(node, aten.add.Tensor, variance, eps))
    normalized = call_before(node, aten.mul.Tensor, centered, scale)
    for name, apply in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if (given := argument(node, name)) is not None:
            shape = [-1, *[1] * (result.ndim - 2)]
            if given.op == "get_attr":
                per_channel = tensor_before(module, node, tensor_of(module, given).detach().reshape(shape))
            else:
                per_channel = call_before(node, aten.reshape.default, given, shape)
            normalized = call_before(node, apply, normalized, per_channel)
    return normalized


def centered_layer_norm(module: GraphModule, node: Node) -> Node:
    """Subtract the mean of what a layer norm normalizes before the norm."""
    x, dims = argument(node, "input"), list(range(-len(argument(node, "normalized_shape")), 0))
    centered = call_before(node, aten.sub.Tensor, x, call_before(node, aten.mean.dim, x, dims, True))
    return call_before(node, node.target, centered, *node.args[1:])


def centered_group_norm(module: GraphModule, node: Node) -> Node | None:
    """Subtract the mean of each group before a group norm."""
    x, groups = argument(node, "input"), argument(node, "num_groups")
    val = value(x)
    if val is None or not all(isinstance(size, int) for size in val.shape[1:]):
        return None
    rows = call_before(node, aten.reshape.default, x, [-1, groups, val.shape[1:].numel() // groups])
    centered = call_before(node, aten.sub.Tensor, rows, call_before(node, aten.mean.dim, rows, [-1], True))
    images = call_before(node, aten.reshape.default, centered, [-1, *val.shape[1:]])
    return call_before(node, node.target, images, *node.args[1:])


NORMALIZATION_REWRITES: dict[Any, Rewrite] = {
    aten.batch_norm.default: batch_norm,
    aten.instance_norm.default: instance_norm,
}

CENTERED_NORM_REWRITES: dict[Any, Rewrite] = {
    aten.layer_norm.default: centered_layer_norm,
    aten.group_norm.default: centered_group_norm,
}
