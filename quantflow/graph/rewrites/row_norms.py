"""Rewrites of norms over the last dimensions into linear layers with equal weights and arithmetic, which delegates run in one
piece; exact but for the order of sums.

The mean is subtracted before squares are summed, so that no digits of the variance are lost.
"""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, is_half, node_argument, tensor_value, value
from quantflow.graph.rewrites.reductions import reduced_dimensions, weighted_sum
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, constant_before, open_shape
from quantflow.upstream.operators import OpOverload


def layer_norm(module: GraphModule, node: Node) -> Node | None:
    """Write a layer norm as arithmetic."""
    rows = _rows(node)
    if rows is None:
        return None
    mean = _mean(module, node, rows)
    centered = call_before(node, aten.sub.Tensor, rows, mean)
    return _scaled(node, _divided(module, node, centered, argument(node, "eps")))


def rms_norm(module: GraphModule, node: Node) -> Node | None:
    """Write a norm by the root mean square as arithmetic."""
    rows = _rows(node)
    if rows is None:
        return None
    eps = argument(node, "eps")
    return _scaled(
        node, _divided(module, node, rows, torch.finfo(tensor_value(rows).dtype).eps if eps is None else eps)
    )


def vector_norm(module: GraphModule, node: Node) -> Node | None:
    """Write a Euclidean norm as the square root of a sum of squares."""
    dims = reduced_dimensions(node)
    if dims is None or argument(node, "ord") != 2 or is_half(node_argument(node)):
        return None
    squares = call_before(node, aten.pow.Tensor_Scalar, node_argument(node), 2)
    return call_before(node, aten.sqrt.default, weighted_sum(module, node, dims, 1.0, squares))


def _rows(node: Node) -> Node | None:
    """The input of the norm ``node``, as rows that are normalized each; None if the norm can't be rewritten."""
    x = argument(node, "input")
    count = len(argument(node, "normalized_shape"))
    if value(x) is None or is_half(x) or not all(isinstance(size, int) for size in argument(node, "normalized_shape")):
        return None
    sizes = open_shape(x)
    if sizes is None or not tensor_value(x).ndim > count or 0 in tensor_value(x).shape:
        return None
    lead, features = sizes[:-count], math.prod(argument(node, "normalized_shape"))
    return x if count == 1 else call_before(node, aten.reshape.default, x, [*lead, features])


def _mean(module: GraphModule, node: Node, rows: Node) -> Node:
    features = tensor_value(rows).shape[-1]
    weights = constant_before(module, node, 1 / features, (1, features))
    return call_before(node, aten.linear.default, rows, weights)


def _divided(module: GraphModule, node: Node, rows: Node, eps: float) -> Node:
    """``rows`` divided by their root mean square."""
    squares = _mean(module, node, call_before(node, aten.pow.Tensor_Scalar, rows, 2))
    shifted = call_before(node, aten.add.Tensor, squares, constant_before(module, node, eps))
    return call_before(node, aten.mul.Tensor, rows, call_before(node, aten.rsqrt.default, shifted))


def _scaled(node: Node, rows: Node) -> Node:
    """``rows`` in the shape of the norm ``node``, times its weight, plus its bias."""
    if len(argument(node, "normalized_shape")) > 1:
        rows = call_before(node, aten.reshape.default, rows, open_shape(node))
    for name, apply in (("weight", aten.mul.Tensor), ("bias", aten.add.Tensor)):
        given = argument(node, name) if name == "weight" or node.target is aten.layer_norm.default else None
        if given is not None:
            rows = call_before(node, apply, rows, given)
    return rows


ROW_NORM_REWRITES: dict[OpOverload, Rewrite] = {
    aten.layer_norm.default: layer_norm,
    aten.rms_norm.default: rms_norm,
    aten.linalg_vector_norm.default: vector_norm,
}
