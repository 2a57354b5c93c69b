"""Rewrites of 3-d convolutions into 2-d convolutions, exact in float.

A convolution of depth ``k`` becomes a convolution over images that join the channels of ``k`` neighbours. There is a single
sum, so an int8 result is rounded once, as in the 3-d convolution. The weight ``[O, C/g, k, h, w]`` becomes
``[O, k·C/g, h, w]``.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, node_argument, op, tensor_value, value
from quantflow.graph.rewrites.padding import same_padding
from quantflow.graph.rewrites.rewriting import call_before
from quantflow.graph.rewrites.volume_form import DEPTH_BEFORE_CHANNELS, as_images, as_volumes, triple, volume_sizes
from quantflow.graph.rewrites.weights import has_own_weight, reshaped_weight
from quantflow.upstream.operators import schema_of

# A rewrite of a convolution, with a flag that tells whether no other node reads its weight.
_Rewrite = Callable[[GraphModule, Node, bool], Node | None]


def convolution(module: GraphModule, node: Node) -> Node | None:
    """Write a 3-d convolution with an unshared weight in 2-d. The weight keeps its name and its elements train as before."""
    return any_convolution(module, node) if has_own_weight(node) else None


def any_convolution(module: GraphModule, node: Node) -> Node | None:
    """Write any 3-d convolution in 2-d, for inference. A shared weight is copied; the graph reshapes a computed weight."""
    return _batched(module, node, _over_images, has_own_weight(node))


def transposed_convolution(module: GraphModule, node: Node) -> Node | None:
    """Write a transposed 3-d convolution as a plain convolution over depth, with zeros inserted between the images, and a
    transposed convolution over height and width.
    """
    return _batched(module, node, _transposed_over_images, has_own_weight(node))


def _batched(module: GraphModule, node: Node, rewrite: _Rewrite, own: bool) -> Node | None:
    """The result of ``rewrite`` on ``node``, with a batch dimension added to a single volume."""
    x = node_argument(node)
    val = value(x)
    if val is None or val.ndim != 4:
        return rewrite(module, node, own)
    if not all(isinstance(size, int) for size in val.shape):
        return None
    batch = call_before(node, aten.reshape.default, x, [1, *val.shape])
    names = [declared.name for declared in schema_of(node.target).arguments[1:]]
    within = call_before(node, op(node), batch, *(argument(node, name) for name in names))
    written = rewrite(module, within, own)
    if written is None:
        return None
    return call_before(node, aten.reshape.default, written, list(tensor_value(node).shape))


def _over_images(module: GraphModule, node: Node, own: bool) -> Node | None:
    if op(node) is aten.conv3d.padding:
        numbered = same_padding(module, node)
        return None if numbered is None else _over_images(module, numbered, own)
    x, weight = argument(node, "input"), argument(node, "weight")
    sizes, kernel = volume_sizes(x), value(weight)
    if sizes is None or kernel is None or volume_sizes(node) is None:
        return None
    stride, padding, dilation = (triple(argument(node, name)) for name in ("stride", "padding", "dilation"))
    groups, taps = argument(node, "groups"), kernel.shape[2]
    images = as_images(node, x)
    if (taps, stride[0], padding[0]) != (1, 1, 0):
        images = _neighbours(node, images, sizes, taps, stride[0], padding[0], dilation[0], groups)

    outputs, _, _, height, width = kernel.shape
    steps = [(aten.permute.default, DEPTH_BEFORE_CHANNELS), (aten.reshape.default, [outputs, -1, height, width])]
    bias, flat = argument(node, "bias"), reshaped_weight(module, node, steps, own)
    out = call_before(node, aten.conv2d.default, images, flat, bias, stride[1:], padding[1:], dilation[1:], groups)
    return as_volumes(node, out)


def _transposed_over_images(module: GraphModule, node: Node, own: bool) -> Node | None:
    x, weight, groups = (argument(node, name) for name in ("input", "weight", "groups"))
    sizes, kernel = volume_sizes(x), value(weight)
    if sizes is None or kernel is None or volume_sizes(node) is None:
        return None
    names = ("stride", "padding", "output_padding", "dilation")
    stride, padding, output_padding, dilation = (triple(argument(node, name)) for name in names)
    channels, per_group, taps, height, width = kernel.shape
    steps = [
        (aten.flip.default, [2]),
        (aten.reshape.default, [groups, channels // groups, per_group, taps, height, width]),
        (aten.permute.default, [0, 3, 1, 2, 4, 5]),
        (aten.reshape.default, [-1, per_group, height, width]),
    ]
    flat = reshaped_weight(module, node, steps, own)
    reach = dilation[0] * (taps - 1) - padding[0]
    images = _spread(node, as_images(node, x), sizes, stride[0], reach, reach + output_padding[0])
    spread = [sizes[0], (sizes[1] - 1) * stride[0] + 1 + 2 * reach + output_padding[0], *sizes[2:]]
    if taps > 1:
        images = _neighbours(node, images, spread, taps, 1, 0, dilation[0], groups)
    sides = (stride[1:], padding[1:], output_padding[1:], groups, dilation[1:])
    out = call_before(node, aten.conv_transpose2d.input, images, flat, argument(node, "bias"), *sides)
    return as_volumes(node, out)


def _spread(node: Node, images: Node, sizes: list[int], stride: int, before: int, behind: int) -> Node:
    """The images of each volume with ``stride - 1`` zero images between them, padded (or cut) at both ends."""
    channels, depth, height, width = sizes
    rows = call_before(node, aten.reshape.default, images, [-1, depth, channels * height * width])
    if stride > 1:
        rows = call_before(node, aten.reshape.default, rows, [-1, depth, 1, channels * height * width])
        rows = call_before(node, aten.constant_pad_nd.default, rows, [0, 0, 0, stride - 1], 0.0)
        rows = call_before(node, aten.reshape.default, rows, [-1, depth * stride, channels * height * width])
        behind -= stride - 1
    if before < 0 or behind < 0:
        length = depth * stride
        rows = call_before(node, aten.slice.Tensor, rows, 1, max(-before, 0), length - max(-behind, 0))
    if before > 0 or behind > 0:
        rows = call_before(node, aten.constant_pad_nd.default, rows, [0, 0, max(before, 0), max(behind, 0)], 0.0)
    return call_before(node, aten.reshape.default, rows, [-1, channels, height, width])


def _neighbours(
    node: Node, images: Node, sizes: list[int], taps: int, stride: int, padding: int, dilation: int, groups: int
) -> Node:
    """For each output image, the input images in its window, concatenated by channels (within each group)."""
    channels, depth, height, width = sizes
    flat = channels * height * width
    windows = (depth + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    rows = call_before(node, aten.reshape.default, images, [-1, depth, flat])
    # The length is a multiple of the stride, so that a view and a slice take every stride-th row: backends lack strided slices.
    length = windows + dilation * (taps - 1) // stride
    end = length * stride - depth - padding
    if padding or end > 0:
        rows = call_before(node, aten.constant_pad_nd.default, rows, [0, 0, padding, max(end, 0)], 0.0)
    if end < 0:
        rows = call_before(node, aten.slice.Tensor, rows, 1, 0, length * stride)
    if stride > 1:
        rows = call_before(node, aten.reshape.default, rows, [-1, length, stride, flat])
    seen = []
    for tap in range(taps):
        start, phase = divmod(tap * dilation, stride)
        picked = rows
        if stride > 1:
            picked = call_before(node, aten.slice.Tensor, picked, 2, phase, phase + 1)
        if windows != length:
            picked = call_before(node, aten.slice.Tensor, picked, 1, start, start + windows)
        if stride > 1 or groups > 1:
            picked = call_before(node, aten.reshape.default, picked, [-1, windows, groups, flat // groups])
        seen.append(picked)
    joined = seen[0] if taps == 1 else call_before(node, aten.cat.default, seen, -1)
    return call_before(node, aten.reshape.default, joined, [-1, taps * channels, height, width])
