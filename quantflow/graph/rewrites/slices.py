"""Rewrites of slices with a step and of sliding windows into slices of neighbours, exact."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, node_argument, tensor_value, value
from quantflow.graph.rewrites.batches import includes_batch
from quantflow.graph.rewrites.joins import stack
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, open_shape
from quantflow.upstream.operators import OpOverload

_WINDOWS = 64  # sliding windows are written as up to this many slices


def strided_slice(module: GraphModule, node: Node) -> Node | None:
    """Write a slice with a step as a view of blocks, of which the first element is taken."""
    x, dim, step = node_argument(node), argument(node, "dim"), argument(node, "step")
    val, out = value(x), value(node)
    if val is None or out is None or step == 1:
        return None
    dim %= val.ndim
    size, count = val.shape[dim], out.shape[dim]
    if not isinstance(size, int) or not isinstance(count, int) or not count or includes_batch(x, [dim]):
        return None
    start = argument(node, "start") or 0
    return every(node, x, dim, min(max(start + size if start < 0 else start, 0), size), count, step)


def every(node: Node, x: Node, dim: int, start: int, count: int, step: int) -> Node | None:
    """Insert, before ``node``, ``count`` elements of ``x`` along ``dim``, from ``start`` in steps of ``step``."""
    size = tensor_value(x).shape[dim]
    if step == 1 or count == 1:
        return call_before(node, aten.slice.Tensor, x, dim, start, start + count)
    whole = count if start + count * step <= size else count - 1  # blocks of ``step`` elements
    blocks = call_before(node, aten.slice.Tensor, x, dim, start, start + whole * step)
    shape, sizes = open_shape(blocks), open_shape(x)
    if shape is None or sizes is None:
        return None
    blocks = call_before(node, aten.reshape.default, blocks, [*shape[:dim], whole, step, *shape[dim + 1 :]])
    first = call_before(node, aten.slice.Tensor, blocks, dim + 1, 0, 1)
    first = call_before(node, aten.reshape.default, first, [*sizes[:dim], whole, *sizes[dim + 1 :]])
    if whole == count:
        return first
    last = start + whole * step
    return call_before(
        node, aten.cat.default, [first, call_before(node, aten.slice.Tensor, x, dim, last, last + 1)], dim
    )


def sliding_windows(module: GraphModule, node: Node) -> Node | None:
    """Write ``unfold``, the windows of one dimension, as slices that are stacked."""
    x, dim, size, step = (argument(node, name) for name in ("self", "dimension", "size", "step"))
    val, out = value(x), value(node)
    if val is None or out is None or not val.ndim:
        return None
    dim %= val.ndim
    count = out.shape[dim]
    if not isinstance(count, int) or not 0 < count <= _WINDOWS or includes_batch(x, [dim]):
        return None
    windows = [call_before(node, aten.slice.Tensor, x, dim, i * step, i * step + size) for i in range(count)]
    stacked = stack(module, call_before(node, aten.stack.default, windows, dim))
    if stacked is None:
        return None
    order = [*range(dim + 1), *range(dim + 2, val.ndim + 1), dim + 1]
    return call_before(node, aten.permute.default, stacked, order)


SLICE_REWRITES: dict[OpOverload, Rewrite] = {
    aten.slice.Tensor: strided_slice,
    aten.unfold.default: sliding_windows,
}
