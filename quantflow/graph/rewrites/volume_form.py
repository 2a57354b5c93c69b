"""Conversion of volumes ``[N, C, D, H, W]`` to ``N·D`` images ``[N·D, C, H, W]``, and back."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from quantflow.graph.aten import aten, op, value
from quantflow.graph.rewrites.rewriting import call_before

DEPTH_BEFORE_CHANNELS = [0, 2, 1, 3, 4]


def triple(given: Any) -> list[int]:
    """Return the three sizes of a 3-d window, which operators take as one number or as three."""
    sizes = [given] if isinstance(given, int) else list(given)
    return sizes * 3 if len(sizes) == 1 else sizes


def volume_sizes(node: Any) -> list[int] | None:
    """Return channels, depth, height and width of a volume; None if they are dynamic or zero, or ``node`` is no volume."""
    val = value(node) if isinstance(node, Node) else None
    if val is None or val.ndim != 5 or not all(isinstance(s, int) and s for s in val.shape[1:]):
        return None
    if isinstance(val.shape[0], int) and not val.shape[0]:
        return None
    return list(val.shape[1:])


def is_folded(node: Any) -> bool:
    """Whether ``node`` is a result of :func:`as_volumes`."""
    if not isinstance(node, Node) or op(node) is not aten.permute.default or volume_sizes(node) is None:
        return False
    split, dims = node.args[0], node.args[1]
    if op(split) is not aten.reshape.default or list(dims) != DEPTH_BEFORE_CHANNELS:  # type: ignore[arg-type, call-overload]
        return False
    images = value(split.args[0])  # type: ignore[union-attr, arg-type]
    channels, _, *rest = volume_sizes(node)  # type: ignore[misc]
    return images is not None and list(images.shape[1:]) == [channels, *rest]


def as_images(node: Node, x: Node) -> Node:
    """Return the volume ``x`` as images, inserted before ``node``."""
    if is_folded(x):
        return x.args[0].args[0]  # type: ignore[union-attr, return-value]
    channels, _, height, width = volume_sizes(x)  # type: ignore[misc]
    behind = call_before(node, aten.permute.default, x, DEPTH_BEFORE_CHANNELS)
    return call_before(node, aten.reshape.default, behind, [-1, channels, height, width])


def as_volumes(node: Node, images: Node) -> Node:
    """Return ``images`` as a volume in the shape of ``node``."""
    _, *rest = value(images).shape  # type: ignore[union-attr]
    split = call_before(node, aten.reshape.default, images, [-1, value(node).shape[2], *rest])  # type: ignore[union-attr]
    return call_before(node, aten.permute.default, split, DEPTH_BEFORE_CHANNELS)
