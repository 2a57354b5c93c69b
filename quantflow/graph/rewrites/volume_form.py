"""Conversion of volumes ``[N, C, D, H, W]`` to ``N·D`` images ``[N·D, C, H, W]``, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from quantflow.graph.aten import argument, aten, node_argument, op, tensor_value, value
from quantflow.graph.rewrites.rewriting import call_before

DEPTH_BEFORE_CHANNELS = [0, 2, 1, 3, 4]


def triple(given: int | Sequence[int]) -> list[int]:
    """Return the three sizes of a 3-d window, which operators take as one number or as three."""
    sizes = [given] if isinstance(given, int) else list(given)
    return sizes * 3 if len(sizes) == 1 else sizes


def volume_sizes(node: object) -> list[int] | None:
    """Return channels, depth, height and width of a volume; None if they are dynamic or zero, or ``node`` is no volume."""
    val = value(node) if isinstance(node, Node) else None
    if val is None or val.ndim != 5 or not all(isinstance(s, int) and s for s in val.shape[1:]):
        return None
    if isinstance(val.shape[0], int) and not val.shape[0]:
        return None
    return list(val.shape[1:])


def is_folded(node: object) -> bool:
    """Whether ``node`` is a result of :func:`as_volumes`."""
    if not isinstance(node, Node) or op(node) is not aten.permute.default:
        return False
    split, sizes = node_argument(node), volume_sizes(node)
    if op(split) is not aten.reshape.default or list(argument(node, "dims")) != DEPTH_BEFORE_CHANNELS:
        return False
    images = value(node_argument(split))
    return images is not None and sizes is not None and list(images.shape[1:]) == [sizes[0], *sizes[2:]]


def as_images(node: Node, x: Node) -> Node:
    """Return the volume ``x`` as images, inserted before ``node``."""
    if is_folded(x):
        return node_argument(node_argument(x))
    sizes = volume_sizes(x)
    assert sizes is not None
    channels, _, height, width = sizes
    behind = call_before(node, aten.permute.default, x, DEPTH_BEFORE_CHANNELS)
    return call_before(node, aten.reshape.default, behind, [-1, channels, height, width])


def as_volumes(node: Node, images: Node) -> Node:
    """Return ``images`` as a volume in the shape of ``node``."""
    _, *rest = tensor_value(images).shape
    split = call_before(node, aten.reshape.default, images, [-1, tensor_value(node).shape[2], *rest])
    return call_before(node, aten.permute.default, split, DEPTH_BEFORE_CHANNELS)
