"""Rewrites of max pools over windows of any size, with indices, into a gather of each window's elements, exact."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, node_argument, op, tensor_value, value
from quantflow.graph.rewrites.rewriting import (
    Replacement,
    Rewrite,
    call_before,
    call_part,
    open_sizes,
    reads_part,
    tensor_before,
)
from quantflow.graph.rewrites.volume_form import triple
from quantflow.upstream.operators import OpOverload

# The positions that each window of one dimension covers.
Windows = list[list[int]]


def adaptive_windows(size: int, count: int) -> Windows:
    """Return the windows of an adaptive pool with ``count`` outputs over ``size`` positions."""
    return [list(range(i * size // count, -(-(i + 1) * size // count))) for i in range(count)]


def sliding_windows(size: int, count: int, kernel: int, stride: int, padding: int, dilation: int) -> Windows:
    """Return the windows of a pool with ``count`` outputs over ``size`` positions, without positions in the padding."""
    starts = range(-padding, count * stride - padding, stride)
    reaches = [range(start, start + kernel * dilation, dilation) for start in starts]
    return [[position for position in reach if 0 <= position < size] for reach in reaches]


def adaptive_max_pool(module: GraphModule, node: Node) -> Replacement:
    """Write an adaptive max pool over one, two or three dimensions as a gather and a maximum."""
    given, val = argument(node, "output_size"), value(node_argument(node))
    dims = {aten.adaptive_max_pool1d.default: 1, aten.adaptive_max_pool2d.default: 2}.get(op(node), 3)
    if val is None or not all(isinstance(size, int) for size in val.shape[-dims:]):
        return None
    sizes, counts = (
        list(val.shape[-dims:]),
        [given] * dims if isinstance(given, int) else list(given) * (dims // len(given)),
    )
    counts = [size if count is None else count for size, count in zip(sizes, counts, strict=True)]
    if not all((*sizes, *counts)):
        return None
    if dims == 2 and not any(size % count for size, count in zip(sizes, counts, strict=True)):
        window = [size // count for size, count in zip(sizes, counts, strict=True)]
        return call_before(node, aten.max_pool2d_with_indices.default, node.args[0], window)
    return _maxima(module, node, [adaptive_windows(size, count) for size, count in zip(sizes, counts, strict=True)])


def max_pool3d_with_indices(module: GraphModule, node: Node) -> Replacement:
    """Write a 3-d max pool with indices as a gather and a maximum."""
    val, pooled = value(node_argument(node)), node.meta["val"][0]
    if val is None or not all(isinstance(size, int) for size in val.shape[-3:]):
        return None
    kernel = triple(argument(node, "kernel_size"))
    sides = (triple(argument(node, name) or kernel) for name in ("stride", "padding", "dilation"))
    each = zip(val.shape[-3:], pooled.shape[-3:], kernel, *sides, strict=True)
    return _maxima(module, node, [sliding_windows(*given) for given in each])


def _maxima(module: GraphModule, node: Node, windows: Sequence[Windows]) -> Replacement:
    """The results of ``node``: the maxima over ``windows``, given by dimension, and their indices. None if a size other than
    the batch is dynamic or a window is empty.
    """
    shape = tensor_value(node_argument(node)).shape
    lead = open_sizes(shape[: -len(windows)])
    if lead is None or not all(map(all, windows)):
        return None
    if reads_part(node, 1):
        return _joint_maxima(module, node, lead, list(shape[-len(windows) :]), windows)
    x = node_argument(node)
    before, behind = lead, list(shape[-len(windows) :])
    for spans in windows:
        dim, size = len(before), behind.pop(0)
        if spans != [[position] for position in range(size)]:
            longest = max(map(len, spans))
            picked = [position for span in spans for position in _filled(span, longest)]
            x = call_before(node, aten.index_select.default, x, dim, tensor_before(module, node, torch.tensor(picked)))
            x = call_before(node, aten.reshape.default, x, [*before, len(spans), longest, *behind])
            x = call_before(node, aten.amax.default, x, [dim + 1])
        before = [*before, len(spans)]
    return [x]


def _joint_maxima(
    module: GraphModule, node: Node, lead: list[int], sizes: list[int], windows: Sequence[Windows]
) -> list[Node]:
    steps = [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]
    spans = [
        [sum(p * step for p, step in zip(place, steps, strict=True)) for place in itertools.product(*window)]
        for window in itertools.product(*windows)
    ]
    longest = max(map(len, spans))
    table = torch.tensor([_filled(span, longest) for span in spans])
    flat = call_before(node, aten.reshape.default, node.args[0], [*lead, math.prod(sizes)])
    places = tensor_before(module, node, table.flatten())
    picked = call_before(node, aten.index_select.default, flat, len(lead), places)
    picked = call_before(node, aten.reshape.default, picked, [*lead, *table.shape])
    greatest = call_before(node, aten.max.dim, picked, len(lead) + 1)
    maxima, found = (call_part(node, greatest, part) for part in (0, 1))
    rows = tensor_before(module, node, torch.arange(len(spans)) * longest)
    found = call_before(node, aten.add.Tensor, found, rows)
    found = call_before(node, aten.index.Tensor, places, [found])
    shape = [*lead, *map(len, windows)]
    return [call_before(node, aten.reshape.default, part, shape) for part in (maxima, found)]


def _filled(span: list[int], length: int) -> list[int]:
    """``span`` padded to ``length`` with its first position, which changes neither the maximum nor its first index."""
    return span + span[:1] * (length - len(span))


WINDOW_REWRITES: dict[OpOverload, Rewrite] = {
    **dict.fromkeys(
        (aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default),
        adaptive_max_pool,
    ),
    aten.max_pool3d_with_indices.default: max_pool3d_with_indices,
}
