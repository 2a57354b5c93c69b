"""Rewrites of medians and sorting into top-k, exact."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, tensor_value, value
from quantflow.graph.rewrites.rewriting import Replacement, Rewrite, call_before, call_part
from quantflow.upstream.operators import OpOverload


def median(module: GraphModule, node: Node) -> Node | None:
    """Write the median of all elements as a top-k; NaN if an element is NaN."""
    x = argument(node, "self")
    val = value(x)
    if val is None or not val.numel() or not all(isinstance(size, int) for size in val.shape):
        return None
    flat = call_before(node, aten.reshape.default, x, [val.numel()])
    return _middle(node, flat, 0, keepdim=False)[0]


def median_of_rows(module: GraphModule, node: Node) -> Replacement:
    """Write the median along a dimension and its index as a top-k; NaN, with the index of a NaN, if an element is NaN."""
    x, dim = argument(node, "self"), argument(node, "dim")
    val = value(x)
    if val is None or not val.ndim or not isinstance(val.shape[dim], int):
        return None
    return _middle(node, x, dim % val.ndim, keepdim=argument(node, "keepdim"))


def sort(module: GraphModule, node: Node) -> Replacement:
    """Write a sort along a dimension as a top-k of all values."""
    x, dim = argument(node, "self"), argument(node, "dim")
    val = value(x)
    if val is None or not val.ndim or not isinstance(val.shape[dim], int):
        return None
    truths = val.dtype is torch.bool  # topk has no kernel for bool
    x = call_before(node, aten.to.dtype, x, torch.uint8) if truths else x
    found = call_before(node, aten.topk.default, x, val.shape[dim], dim, argument(node, "descending"), True)
    if truths:
        return [call_before(node, aten.to.dtype, call_part(node, found, 0), torch.bool), call_part(node, found, 1)]
    return found


def argsort(module: GraphModule, node: Node) -> Replacement:
    """Write an argsort along a dimension as the indices of a top-k."""
    found = sort(module, node)
    return call_part(node, found, 1) if isinstance(found, Node) else found and found[1]


def _middle(node: Node, x: Node, dim: int, *, keepdim: bool) -> list[Node]:
    """The median of ``x`` along ``dim`` and its index, inserted before ``node``: the maximum of the smaller half."""
    size = tensor_value(x).shape[dim]
    smallest = call_before(node, aten.topk.default, x, (size + 1) // 2, dim, False, True)
    middle = [call_before(node, aten.slice.Tensor, call_part(node, smallest, part), dim, -1) for part in (0, 1)]
    if tensor_value(x).is_floating_point():
        missing = call_before(node, aten.isnan.default, x)
        # The maximum of a row with a NaN is the NaN.
        greatest = call_before(node, aten.topk.default, x, 1, dim, True, True)
        unclear = call_before(node, aten.any.dim, missing, dim, True)
        middle = [
            call_before(node, aten.where.self, unclear, call_part(node, greatest, part), given)
            for part, given in enumerate(middle)
        ]
    return middle if keepdim else [call_before(node, aten.squeeze.dim, given, dim) for given in middle]


ORDER_REWRITES: dict[OpOverload, Rewrite] = {
    aten.median.default: median,
    aten.median.dim: median_of_rows,
    aten.sort.default: sort,
    aten.argsort.default: argsort,
}
