"""Rewrites of resizing by nearest neighbours into copies and slices, exact, and of cubic interpolation and averages over uneven
windows into linear layers over height and width, exact but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, is_float_tensor, node_argument, op, tensor_value, value
from quantflow.graph.rewrites.joins import joined, runs_of
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, open_shape, tensor_before
from quantflow.upstream.operators import OpOverload, schema_of

_TIMES = 4  # an enlargement up to this factor is written as copies
_RUNS = 16  # another resize as up to this many slices of each dimension


def nearest(module: GraphModule, node: Node) -> Node | None:
    """Write a resize of images by nearest neighbours as copies, or as a concatenation of slices."""
    if not _is_static(node):
        return None
    places = {dim: _interpolation(node, dim).argmax(1).tolist() for dim in (3, 2)}
    times = {dim: _repeats(places[dim], tensor_value(node_argument(node)).shape[dim]) for dim in places}
    if any(times[dim] is None and len(runs_of(places[dim])) > _RUNS for dim in places):
        return None
    x = node_argument(node)
    for dim, repeated in times.items():
        x = joined(node, x, dim, runs_of(places[dim])) if repeated is None else _copied(node, x, dim, repeated)
    return x


def by_matrices(module: GraphModule, node: Node) -> Node | None:
    """Write a resize of images of finite values, linear in each dimension, as one linear layer for each."""
    if not _is_static(node) or not is_float_tensor(node):
        return None
    x = node_argument(node)
    for dim in (3, 2):
        weight = tensor_before(module, node, _interpolation(node, dim).to(tensor_value(node).dtype))
        if dim == 2:
            x = call_before(node, aten.transpose.int, x, 2, 3)
        x = call_before(node, aten.linear.default, x, weight)
        if dim == 2:
            x = call_before(node, aten.transpose.int, x, 2, 3)
    return x


def _is_static(node: Node) -> bool:
    """Whether ``node`` resizes images of known size, one for each example."""
    x = node_argument(node)
    if value(x) is None or value(node) is None or tensor_value(x).ndim != 4:
        return False
    sizes = open_shape(x)
    sides = [*tensor_value(x).shape[1:], *tensor_value(node).shape[2:]]
    known = all(isinstance(side, int) and side > 0 for side in sides)
    return known and sizes is not None and -1 not in sizes[1:]


def _interpolation(node: Node, dim: int) -> torch.Tensor:
    """The matrix by which ``node`` multiplies dimension ``dim`` of its images: output places by input places."""
    size, place = tensor_value(node_argument(node)).shape[dim], dim - 2
    declared = [a.name for a in schema_of(node.target).arguments if a.name not in ("input", "self")]
    given: dict[str, Any] = {name: argument(node, name) for name in declared}
    for name, alone in (("output_size", 1), ("scale_factors", 1.0)):
        if given.get(name) is not None:
            given[name] = [side if i == place else alone for i, side in enumerate(given[name])]
    if (other := ("scales_w", "scales_h")[place]) in given:
        given[other] = None
    basis = torch.eye(size).reshape(size, 1, *((size, 1) if place == 0 else (1, size)))
    return cast(Callable, op(node))(basis, **given).reshape(size, -1).T.contiguous()


def _repeats(places: list[int], size: int) -> int | None:
    """How often each place is repeated, if ``places`` only repeat all in order; None if they do not."""
    times, rest = divmod(len(places), size)
    whole = not rest and times <= _TIMES and places == [place for place in range(size) for _ in range(times)]
    return times if whole else None


def _copied(node: Node, x: Node, dim: int, times: int) -> Node:
    if times == 1:
        return x
    channels, height, width = tensor_value(x).shape[1:]
    apart = [-1, channels * height, width, 1] if dim == 3 else [-1, channels * height, 1, width]
    # executorch's partitioner refuses a concatenation of one tensor with itself.
    parts = [call_before(node, aten.reshape.default, x, apart) for _ in range(times)]
    copies = call_before(node, aten.cat.default, parts, dim)
    together = [-1, channels, height, width * times] if dim == 3 else [-1, channels, height * times, width]
    return call_before(node, aten.reshape.default, copies, together)


_NEAREST = (
    *(aten.upsample_nearest2d.vec, aten._upsample_nearest_exact2d.vec),
    *(aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.default),
)
RESIZE_REWRITES: dict[OpOverload, Rewrite] = {
    **dict.fromkeys(_NEAREST, nearest),
    **dict.fromkeys((aten.upsample_bicubic2d.vec, aten.upsample_bicubic2d.default), by_matrices),
}
