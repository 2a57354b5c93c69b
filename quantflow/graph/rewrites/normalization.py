"""Rewrites of norms over their own statistics, whose portable kernels compute a variance as ``E[x²] - E[x]²``.

That difference loses the digits of the variance where the mean is large: with a mean of 1,000 standard deviations the result
has 24 dB. These rewrites subtract the mean first.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, is_half, op, tensor_value, value
from quantflow.graph.parameters import tensor_of
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, tensor_before
from quantflow.upstream.operators import OpOverload


def batch_norm(module: GraphModule, node: Node) -> Node | None:
    """Write a batch norm without running statistics as arithmetic."""
    x = value(node)
    if argument(node, "running_mean") is not None or x is None or x.ndim < 2:
        return None
    return _scaled(module, node, _normalized(module, node, _widened(node), [0, *range(2, x.ndim)]))


def instance_norm(module: GraphModule, node: Node) -> Node | None:
    """Write an instance norm without running statistics as arithmetic."""
    x = value(node)
    if argument(node, "running_mean") is not None or x is None or x.ndim < 3:
        return None
    return _scaled(module, node, _normalized(module, node, _widened(node), list(range(2, x.ndim))))


def group_norm(module: GraphModule, node: Node) -> Node | None:
    """Write a group norm as arithmetic over images with a channel for each group."""
    x, groups = value(argument(node, "input")), argument(node, "num_groups")
    if x is None or not all(isinstance(size, int) for size in x.shape[1:]) or not x.shape[1:].numel():
        return None
    width = x.shape[-1] if x.ndim > 2 else 1
    shape = [-1, groups, x.shape[1:].numel() // (groups * width), width]
    images = call_before(node, aten.reshape.default, _widened(node), shape)
    normalized = _normalized(module, node, images, [2, 3])
    return _scaled(module, node, call_before(node, aten.reshape.default, normalized, [-1, *x.shape[1:]]))


def _widened(node: Node) -> Node:
    """The input of the norm ``node``, in float32 if it is in half precision: ATen computes the statistics so."""
    x = argument(node, "input")
    return call_before(node, aten.to.dtype, x, torch.float32) if is_half(x) else x


def _normalized(module: GraphModule, node: Node, x: Node, dims: list[int]) -> Node:
    """``x`` normalized over ``dims``, with the ``eps`` of the norm ``node``."""
    val = value(x)
    assert val is not None
    centered = call_before(node, aten.sub.Tensor, x, call_before(node, aten.mean.dim, x, dims, True))
    squares = call_before(node, aten.mul.Tensor, centered, centered)
    variance = call_before(node, aten.mean.dim, squares, dims, True)
    eps = tensor_before(module, node, torch.full((1,) * val.ndim, argument(node, "eps"), dtype=val.dtype))
    scale = call_before(node, aten.rsqrt.default, call_before(node, aten.add.Tensor, variance, eps))
    return call_before(node, aten.mul.Tensor, centered, scale)


def _scaled(module: GraphModule, node: Node, normalized: Node) -> Node:
    """``normalized`` times the weight of the norm ``node``, plus its bias, per channel."""
    result = value(node)
    assert result is not None
    for name, apply in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        if (given := argument(node, name)) is not None:
            shape = [-1, *[1] * (result.ndim - 2)]
            if given.op == "get_attr":
                per_channel = tensor_before(module, node, tensor_of(module, given).detach().reshape(shape))
            else:
                per_channel = call_before(node, aten.reshape.default, given, shape)
            normalized = call_before(node, apply, normalized, per_channel)
    same = tensor_value(normalized).dtype == result.dtype
    return normalized if same else call_before(node, aten.to.dtype, normalized, result.dtype)


def centered_layer_norm(module: GraphModule, node: Node) -> Node:
    """Subtract the mean of what a layer norm normalizes before the norm."""
    x, dims = argument(node, "input"), list(range(-len(argument(node, "normalized_shape")), 0))
    centered = call_before(node, aten.sub.Tensor, x, call_before(node, aten.mean.dim, x, dims, True))
    others = (argument(node, name) for name in ("normalized_shape", "weight", "bias", "eps", "cudnn_enable"))
    return call_before(node, op(node), centered, *others)


NORMALIZATION_REWRITES: dict[OpOverload, Rewrite] = {
    aten.batch_norm.default: batch_norm,
    aten.group_norm.default: group_norm,
    aten.instance_norm.default: instance_norm,
}

CENTERED_NORM_REWRITES: dict[OpOverload, Rewrite] = {
    aten.layer_norm.default: centered_layer_norm,
}
