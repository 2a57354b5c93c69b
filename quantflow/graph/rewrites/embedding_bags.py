"""Rewrites of embedding bags into products with the 0/1 matrix of the rows in each bag."""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, has_argument, tensor_value, value
from quantflow.graph.parameters import is_constant, tensor_of
from quantflow.graph.rewrites.rewriting import Replacement, Rewrite, call_before, reads_part, tensor_before
from quantflow.upstream.operators import OpOverload

_SUM, _MEAN, _MAX = range(3)  # the operator's modes
_FAST = (torch.float32, torch.float16, torch.bfloat16)  # dtypes for which the operator has a fast sum


def embedding_bag(module: GraphModule, node: Node) -> Replacement:
    """Write an embedding bag as a product or a maximum. The rows of a bag reach from its offset to that of the next bag."""
    weight, indices, offsets = (argument(node, name) for name in ("weight", "indices", "offsets"))
    ids, starts = value(indices), value(offsets)
    if ids is None or starts is None or any(reads_part(node, part) for part in (1, 2, 3)):
        return None
    if not all(isinstance(size, int) for size in (*ids.shape, *starts.shape)):
        return None
    dtype, count = tensor_value(weight).dtype, ids.shape[0]
    if not count and argument(node, "mode") == _MAX:
        return None
    places = tensor_before(module, node, torch.arange(count, dtype=starts.dtype))
    column = call_before(node, aten.reshape.default, offsets, [-1, 1])
    reached = _cast(node, call_before(node, aten.ge.Tensor, places, column), dtype)
    bags = starts.shape[0] - int(argument(node, "include_last_offset"))
    here = call_before(node, aten.slice.Tensor, reached, 0, 0, bags)
    none = tensor_before(module, node, torch.zeros(1, count, dtype=dtype))
    padding = argument(node, "padding_idx") if has_argument(node, "padding_idx") else None
    padded = padding is not None and padding >= 0
    # If the last offset is the end of the last bag, the fast sum stops there. Bag sizes and all other modes include later rows.
    fast = dtype in _FAST and not padded and argument(node, "mode") != _MAX
    ends_last = bags < starts.shape[0] and fast
    to_the_end = call_before(node, aten.cat.default, [call_before(node, aten.slice.Tensor, reached, 0, 1, bags), none])
    next_one = call_before(node, aten.slice.Tensor, reached, 0, 1, bags + 1) if ends_last else to_the_end
    # [bags, rows]: 1 for a row of the bag
    inside, counted = (call_before(node, aten.sub.Tensor, here, behind) for behind in (next_one, to_the_end))
    if padded:
        real = _cast(node, call_before(node, aten.ne.Scalar, indices, padding), dtype)
        inside, counted = (call_before(node, aten.mul.Tensor, bag, real) for bag in (inside, counted))
    rows = call_before(node, aten.embedding.default, weight, indices)
    if (scales := argument(node, "per_sample_weights")) is not None:
        rows = call_before(node, aten.mul.Tensor, rows, call_before(node, aten.reshape.default, scales, [-1, 1]))
    sizes = call_before(node, aten.sum.dim_IntList, counted, [1], True)
    if argument(node, "mode") == _MAX:
        return [_greatest(module, node, rows, inside, sizes)]
    if is_constant(weight) and bool(tensor_of(module, weight).isfinite().all()):
        sums = call_before(node, aten.mm.default, inside, rows)
    else:  # zero times infinity is NaN
        sums = call_before(node, aten.sum.dim_IntList, _spread(module, node, rows, inside, 0.0), [1])
    if argument(node, "mode") == _MEAN:
        sums = call_before(node, aten.div.Tensor, sums, call_before(node, aten.clamp.default, sizes, 1.0))
    return [sums]


def _greatest(module: GraphModule, node: Node, rows: Node, inside: Node, sizes: Node) -> Node:
    """The maximum over each bag, zero for an empty bag."""
    greatest = call_before(node, aten.amax.default, _spread(module, node, rows, inside, -math.inf), [1])
    zero = _number(module, rows, node, 0.0)
    return call_before(node, aten.where.self, call_before(node, aten.gt.Scalar, sizes, 0.0), greatest, zero)


def _spread(module: GraphModule, node: Node, rows: Node, inside: Node, other: float) -> Node:
    """The ``rows`` of each bag, [bags, rows, features], with ``other`` for rows outside the bag."""
    chosen = call_before(node, aten.gt.Scalar, call_before(node, aten.unsqueeze.default, inside, 2), 0.0)
    each = call_before(node, aten.unsqueeze.default, rows, 0)
    return call_before(node, aten.where.self, chosen, each, _number(module, rows, node, other))


def _number(module: GraphModule, like: Node, node: Node, number: float) -> Node:
    return tensor_before(module, node, torch.full((1,), number, dtype=tensor_value(like).dtype))


def _cast(node: Node, given: Node, dtype: torch.dtype) -> Node:
    return call_before(node, aten.to.dtype, given, dtype)


EMBEDDING_BAG_REWRITES: dict[OpOverload, Rewrite] = dict.fromkeys(
    (aten.embedding_bag.default, aten.embedding_bag.padding_idx), embedding_bag
)
