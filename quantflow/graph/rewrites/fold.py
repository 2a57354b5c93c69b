"""Rewrites of unfold (image to patches) into a convolution, and of fold (sum of patches) into a transposed convolution.

The rewrites are exact except for the order of sums. Each patch position has a kernel with a single one at that position.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, pair, value
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, open_shape, open_sizes, tensor_before
from quantflow.upstream.operators import OpOverload


def fold(module: GraphModule, node: Node) -> Node | None:
    """Write ``col2im`` as a transposed convolution."""
    x = argument(node, "self")
    val, out = value(x), value(node)
    if val is None or out is None:
        return None
    names = ("output_size", "kernel_size", "dilation", "padding", "stride")
    size, kernel, dilation, padding, stride = (pair(argument(node, name)) for name in names)
    places = kernel[0] * kernel[1]
    lead, rows = open_sizes(val.shape[:-2]), val.shape[-2]
    if lead is None or not all(isinstance(side, int) for side in (rows, *size)):
        return None
    sides = list(zip(size, kernel, dilation, padding, stride, strict=True))
    patches = [(s + 2 * p - d * (k - 1) - 1) // st + 1 for s, k, d, p, st in sides]
    left = [s - ((n - 1) * st - 2 * p + d * (k - 1) + 1) for (s, k, d, p, st), n in zip(sides, patches, strict=True)]
    images = call_before(node, aten.reshape.default, x, [*(lead or [1]), rows, *patches])
    channels = rows // places
    ones = tensor_before(module, node, _ones(channels, kernel, val.dtype))
    folded = call_before(
        node, aten.conv_transpose2d.input, images, ones, None, stride, padding, left, channels, dilation
    )
    return folded if lead else call_before(node, aten.reshape.default, folded, list(out.shape))


def unfold(module: GraphModule, node: Node) -> Node | None:
    """Write ``im2col`` as a convolution."""
    x, sizes = argument(node, "self"), open_shape(node)
    val = value(x)
    if val is None or val.ndim != 4 or sizes is None or not isinstance(val.shape[1], int):
        return None
    kernel, dilation, padding, stride = (
        pair(argument(node, name)) for name in ("kernel_size", "dilation", "padding", "stride")
    )
    ones = tensor_before(module, node, _ones(val.shape[1], kernel, val.dtype))
    patches = call_before(node, aten.conv2d.default, x, ones, None, stride, padding, dilation, val.shape[1])
    return call_before(node, aten.reshape.default, patches, sizes)


def _ones(channels: int, kernel: list[int], dtype: torch.dtype) -> torch.Tensor:
    places = kernel[0] * kernel[1]
    return torch.eye(places, dtype=dtype).reshape(places, 1, *kernel).repeat(channels, 1, 1, 1)


FOLD_REWRITES: dict[OpOverload, Rewrite] = {aten.col2im.default: fold}
PATCH_REWRITES: dict[OpOverload, Rewrite] = {**FOLD_REWRITES, aten.im2col.default: unfold}
