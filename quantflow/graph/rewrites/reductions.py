"""Rewrites of means and sums over any dimensions into linear layers with equal constant weights, exact but for the order
of sums.

A backend that reduces images only runs a linear layer over any last dimension. Equal weights are exact in int8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, is_float_tensor, is_half, node_argument, tensor_value
from quantflow.graph.rewrites.batches import includes_batch
from quantflow.graph.rewrites.pools import mean as mean_of_images
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, constant_before, open_shape
from quantflow.graph.rewrites.weights import EQUAL_WEIGHTS
from quantflow.upstream.operators import OpOverload

_FEW = 4  # up to this many slices are added one by one


def mean(module: GraphModule, node: Node) -> Node | None:
    """Write a mean as a mean over height and width where it is one, else as a linear layer."""
    if (image := mean_of_images(module, node)) is not None:
        return image
    dims = reduced_dimensions(node)
    if dims is None or (tensor_value(node_argument(node)).ndim == 4 and dims == [2, 3]):
        return None
    return weighted_sum(module, node, dims, 1 / _count(node, dims))


def sum_(module: GraphModule, node: Node) -> Node | None:
    """Write a sum as additions of slices where there are few, else as a linear layer."""
    dims = reduced_dimensions(node)
    if dims is None:
        return None
    x = node_argument(node)
    if len(dims) == 1 and _count(node, dims) <= _FEW and dims[0] != tensor_value(x).ndim - 1:
        return _added_slices(node, dims[0])
    return weighted_sum(module, node, dims, 1.0)


def reduced_dimensions(node: Node) -> list[int] | None:
    """Return the dimensions that ``node`` reduces, in order, if their sizes are known and the batch is not among them."""
    x, dims = node_argument(node), argument(node, "dim")
    if not is_float_tensor(x) or argument(node, "dtype") is not None or dims is None or open_shape(node) is None:
        return None
    if is_half(x):
        return None
    val = tensor_value(x)
    dims = sorted(dim % val.ndim for dim in ([dims] if isinstance(dims, int) else dims)) if val.ndim else []
    sizes = [val.shape[dim] for dim in dims]
    static = all(isinstance(size, int) and size > 0 for size in sizes) and val.ndim > 1
    if not dims or not static or open_shape(x) is None or len(dims) == val.ndim:
        return None
    return None if includes_batch(x, dims) else dims


def _count(node: Node, dims: Sequence[int]) -> int:
    return math.prod(tensor_value(node_argument(node)).shape[dim] for dim in dims)


def weighted_sum(module: GraphModule, node: Node, dims: list[int], weight: float, x: Node | None = None) -> Node:
    """Return the sum of ``x`` (by default the input of ``node``) over ``dims``, times ``weight``, in the shape of ``node``."""
    x = node_argument(node) if x is None else x
    rank, count = tensor_value(x).ndim, _count(node, dims)
    kept = [dim for dim in range(rank) if dim not in dims]
    if dims != list(range(len(kept), rank)):
        x = call_before(node, aten.permute.default, x, [*kept, *dims])
    if len(dims) > 1:
        sizes = open_shape(node_argument(node))
        assert sizes is not None
        x = call_before(node, aten.reshape.default, x, [*(sizes[dim] for dim in kept), count])
    weights = constant_before(module, node, weight, (1, count))
    summed = call_before(node, aten.linear.default, x, weights)
    summed.meta[EQUAL_WEIGHTS] = True
    in_place = dims == [rank - 1] and argument(node, "keepdim")
    return summed if in_place else call_before(node, aten.reshape.default, summed, open_shape(node))


def _added_slices(node: Node, dim: int) -> Node:
    x = node_argument(node)
    total: Node | None = None
    for index in range(tensor_value(x).shape[dim]):
        one = call_before(node, aten.slice.Tensor, x, dim, index, index + 1)
        total = one if total is None else call_before(node, aten.add.Tensor, total, one)
    assert total is not None
    return total if argument(node, "keepdim") else call_before(node, aten.reshape.default, total, open_shape(node))


REDUCTION_REWRITES: dict[OpOverload, Rewrite] = {
    aten.mean.dim: mean,
    aten.sum.dim_IntList: sum_,
}
