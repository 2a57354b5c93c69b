"""Rewrites of stacks, rolls and pads with the tensor's own values into concatenations of slices, exact."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, node_argument, tensor_value, value
from quantflow.graph.rewrites.batches import includes_batch
from quantflow.graph.rewrites.pads import negative_pad
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, open_shape
from quantflow.upstream.operators import OpOverload

_FEW = 8  # a pad is written as up to this many slices for each side


def stack(module: GraphModule, node: Node) -> Node | None:
    """Write a stack as a concatenation of views."""
    tensors = argument(node, "tensors")
    if value(node) is None:
        return None
    rank = tensor_value(node).ndim
    dim = argument(node, "dim") % rank
    shapes = [open_shape(tensor) for tensor in tensors]
    if any(shape is None for shape in shapes):
        return None
    rows = [
        call_before(node, aten.reshape.default, tensor, [*shape[:dim], 1, *shape[dim:]])
        for tensor, shape in zip(tensors, shapes, strict=True)
        if shape is not None
    ]
    return call_before(node, aten.cat.default, rows, dim) if len(rows) > 1 else rows[0]


def roll(module: GraphModule, node: Node) -> Node | None:
    """Write a roll along given dimensions as concatenations of two slices."""
    x, shifts, dims = node_argument(node), argument(node, "shifts"), argument(node, "dims")
    val = value(x)
    if val is None or not dims or not all(isinstance(shift, int) for shift in shifts):
        return None
    dims = [dim % val.ndim for dim in dims]
    if not all(isinstance(val.shape[dim], int) and val.shape[dim] for dim in dims) or includes_batch(x, dims):
        return None
    for shift, dim in zip(shifts, dims, strict=True):
        size = val.shape[dim]
        if start := -shift % size:
            x = joined(node, x, dim, [(start, size), (0, start)])
    return x


def pad(module: GraphModule, node: Node) -> Node | None:
    """Write a pad by reflection, by repetition of the edge or from the other side as concatenations of slices, and other pads
    as :func:`negative_pad` does.
    """
    x, pads, mode = argument(node, "self"), argument(node, "pad"), argument(node, "mode")
    val = value(x)
    if mode == "constant":
        return negative_pad(module, node)
    if val is None or mode not in _SOURCES or not all(isinstance(size, int) and 0 <= size <= _FEW for size in pads):
        return None
    dims = [val.ndim - 1 - index // 2 for index in range(0, len(pads), 2)]
    if not all(isinstance(val.shape[dim], int) for dim in dims) or includes_batch(x, dims):
        return None
    for dim, before, after in zip(dims, pads[::2], pads[1::2], strict=True):
        size = val.shape[dim]
        places = [_SOURCES[mode](place, size) for place in range(-before, size + after)]
        if before or after:
            x = joined(node, x, dim, runs_of(places))
    return x


# The place in a dimension of a given size that each mode copies to a place outside of it.
_SOURCES = {
    "reflect": lambda place, size: abs(place) if place < size else 2 * (size - 1) - place,
    "replicate": lambda place, size: min(max(place, 0), size - 1),
    "circular": lambda place, size: place % size,
}


def runs_of(places: list[int]) -> list[tuple[int, int]]:
    """Return ``places`` as ranges of rising numbers."""
    runs = [(places[0], places[0] + 1)]
    for place in places[1:]:
        if place == runs[-1][1]:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs


def joined(node: Node, x: Node, dim: int, ranges: list[tuple[int, int]]) -> Node:
    """Insert the slices of ``x`` in ``ranges`` of dimension ``dim``, joined, before ``node``."""
    parts = [call_before(node, aten.slice.Tensor, x, dim, start, end) for start, end in ranges]
    return call_before(node, aten.cat.default, parts, dim) if len(parts) > 1 else parts[0]


JOIN_REWRITES: dict[OpOverload, Rewrite] = {
    aten.stack.default: stack,
    aten.roll.default: roll,
    aten.pad.default: pad,
}
