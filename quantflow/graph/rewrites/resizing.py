"""Rewrites of resizing by interpolation into copies or linear layers over height and width, exact but for the order of sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import aten, node_argument, op, tensor_value, value
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, open_shape, open_sizes, tensor_before
from quantflow.upstream.operators import OpOverload

_FEW = 4  # an enlargement up to this factor is written as copies


def resize(module: GraphModule, node: Node) -> Node | None:
    """Write a resize of images by nearest neighbours or cubic interpolation as one linear layer for each dimension, and an
    enlargement by whole numbers as copies.
    """
    x = node_argument(node)
    val, out = value(x), value(node)
    if val is None or out is None or val.ndim != 4 or open_shape(x) is None:
        return None
    sides = [*val.shape[1:], *out.shape[2:]]
    if not all(isinstance(side, int) and side > 0 for side in sides):
        return None
    for dim in (3, 2):
        matrix = _interpolation(node, dim)
        times = _repeats(matrix)
        x = _copied(node, x, dim, times) if times is not None else _multiplied(module, node, x, dim, matrix)
    return x


def _interpolation(node: Node, dim: int) -> torch.Tensor:
    """The matrix by which ``node`` multiplies dimension ``dim`` of its images: output places by input places."""
    val = tensor_value(node_argument(node))
    size, other = val.shape[dim], val.shape[5 - dim]
    basis = torch.eye(size, dtype=torch.float32).reshape(size, 1, *((size, 1) if dim == 2 else (1, size)))
    images = basis.expand(size, 1, *((size, other) if dim == 2 else (other, size)))
    resized = cast(Callable, op(node))(images, *node.args[1:], **node.kwargs)
    return (resized[:, 0, :, 0] if dim == 2 else resized[:, 0, 0, :]).T.contiguous()


def _repeats(matrix: torch.Tensor) -> int | None:
    """How often each place is repeated, if ``matrix`` only repeats places; None if it does not."""
    places, size = matrix.shape
    times, rest = divmod(places, size)
    repeated = torch.eye(size).repeat_interleave(max(times, 1), 0)
    return times if not rest and times <= _FEW and torch.equal(matrix, repeated) else None


def _copied(node: Node, x: Node, dim: int, times: int) -> Node:
    if times == 1:
        return x
    sizes = open_sizes(tensor_value(x).shape)
    assert sizes is not None
    batch, channels, height, width = sizes
    apart = [batch, channels * height, width, 1] if dim == 3 else [batch, channels * height, 1, width]
    # executorch's partitioner refuses a concatenation of one tensor with itself.
    parts = [call_before(node, aten.reshape.default, x, apart) for _ in range(times)]
    copies = call_before(node, aten.cat.default, parts, dim)
    together = [batch, channels, height, width * times] if dim == 3 else [batch, channels, height * times, width]
    return call_before(node, aten.reshape.default, copies, together)


def _multiplied(module: GraphModule, node: Node, x: Node, dim: int, matrix: torch.Tensor) -> Node:
    weight = tensor_before(module, node, matrix.to(tensor_value(node).dtype))
    if dim == 3:
        return call_before(node, aten.linear.default, x, weight)
    turned = call_before(node, aten.linear.default, call_before(node, aten.transpose.int, x, 2, 3), weight)
    return call_before(node, aten.transpose.int, turned, 2, 3)


RESIZE_REWRITES: dict[OpOverload, Rewrite] = dict.fromkeys(
    (
        *(aten.upsample_nearest2d.vec, aten._upsample_nearest_exact2d.vec, aten.upsample_bicubic2d.vec),
        *(aten.upsample_nearest2d.default, aten._upsample_nearest_exact2d.default, aten.upsample_bicubic2d.default),
    ),
    resize,
)
