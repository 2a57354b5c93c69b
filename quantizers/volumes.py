"""Operators over volumes as operators over images, for backends without a third dimension: exact in float.

A volume ``[N, C, D, H, W]`` is held as ``N·D`` images ``[N·D, C, H, W]``. A convolution of depth ``k`` becomes one over images
whose channels are those of ``k`` neighbours: one sum, so that integers are rounded once, as in the convolution itself. Between
two such operators the change of form and back is left out, so that batch norm and clamps stand right behind the convolution.

The weight ``[O, C/g, k, h, w]`` becomes a parameter ``[O, k·C/g, h, w]`` of the same name, and trains as before, element by
element.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quantflow.aten import argument, aten, op, value
from quantflow.graph.modes import BATCH_NORM, CUMULATIVE, FROZEN, SWITCHED
from quantflow.graph.parameters import is_constant, read_attribute, reads_of, set_tensor, tensor_of
from quantizers.rewrites import Rewrite, _call, _shape, average_pool, mean, same_padding, scalar_operand

_DEPTH_BEHIND_CHANNELS = [0, 2, 1, 3, 4]


def convolution(module: GraphModule, node: Node) -> Node | None:
    """A convolution over volumes whose weight is its own."""
    numbered = same_padding(module, node) if op(node) is aten.conv3d.padding else node
    return None if numbered is None else _convolution(module, numbered, calls=len({node, numbered}))


def _convolution(module: GraphModule, node: Node, calls: int) -> Node | None:
    """As :func:`convolution`, of a node that is one of ``calls`` that stand for one."""
    x, weight = argument(node, "input"), argument(node, "weight")
    sizes = _sizes(x)
    if sizes is None or not is_constant(weight) or reads_of(node.graph)[str(weight.target)] != calls:
        return None
    stride, padding, dilation = (_triple(argument(node, name)) for name in ("stride", "padding", "dilation"))
    groups, taps = argument(node, "groups"), tensor_of(module, weight).shape[2]
    images = _images(node, x)
    if (taps, stride[0], padding[0]) != (1, 1, 0):
        images = _neighbours(node, images, sizes, taps, stride[0], padding[0], dilation[0], groups)
    bias, flat = argument(node, "bias"), _flat_weight(module, weight)
    out = _call(node, aten.conv2d.default, images, flat, bias, stride[1:], padding[1:], dilation[1:], groups)
    return _volumes(node, out)


def batch_norm(module: GraphModule, node: Node) -> Node | None:
    """A batch norm behind a convolution over volumes: its statistics are those of the images."""
    if not _is_folded(node.args[0]) or node.kwargs:
        return None
    normed = _call(node, BATCH_NORM, _images(node, node.args[0]), *node.args[1:])
    normed.meta.update({key: node.meta[key] for key in (SWITCHED, FROZEN, CUMULATIVE) if key in node.meta})
    return _volumes(node, normed)


def clamp(module: GraphModule, node: Node) -> Node | None:
    """A clamp behind a convolution over volumes."""
    if not _is_folded(node.args[0]):
        return None
    return _volumes(node, _call(node, op(node), _images(node, node.args[0]), *node.args[1:]))


def add(module: GraphModule, node: Node) -> Node | None:
    """A sum of volumes of one shape, one of them held as images; other sums as :func:`scalar_operand` has them."""
    operands = [x for x in node.args[:2] if _sizes(x) is not None and _sizes(x) == _sizes(node)]
    if len(operands) != 2 or node.kwargs or not any(map(_is_folded, operands)):
        return scalar_operand(module, node)
    return _volumes(node, _call(node, op(node), *(_images(node, x) for x in operands)))


def global_pool(module: GraphModule, node: Node) -> Node | None:
    """The mean of a volume, as one over its depth and height in one dimension and its width; others as :func:`mean` does."""
    x, shape = node.args[0], _shape(node)
    sizes = _sizes(x)
    if op(node) is aten.mean.dim:
        whole = sizes is not None and sorted(d % 5 for d in argument(node, "dim") or []) == [2, 3, 4]
        if not whole or argument(node, "dtype") is not None:
            return mean(module, node)
    elif sizes is None or _triple(argument(node, "output_size")) != [1, 1, 1]:
        return None
    if sizes is None or shape is None:
        return None
    channels, depth, height, width = sizes
    image = _call(node, aten.reshape.default, x, [-1, channels, depth * height, width])
    return _call(node, aten.reshape.default, _call(node, aten.mean.dim, image, [2, 3], True), shape)


def pool(module: GraphModule, node: Node) -> Node | None:
    """A pool over windows, as one over height and width and one over depth."""
    x, ceil = node.args[0], argument(node, "ceil_mode")
    sizes = _sizes(x)
    if sizes is None:
        return None
    maximum = op(node) is aten.max_pool3d.default
    kernel, padding = _triple(argument(node, "kernel_size")), _triple(argument(node, "padding"))
    stride = _triple(argument(node, "stride") or kernel)
    windows = [[*kernel, 1], [*stride, 1], [*padding, 0]]  # the fourth dimension is one over which nothing is pooled
    if maximum:
        windows.append([*_triple(argument(node, "dilation")), 1])
    elif ceil or argument(node, "divisor_override") or (any(padding) and not argument(node, "count_include_pad")):
        return None

    def over(images: Node, *dims: int) -> Node:
        sides = [[sides[d] for d in dims] for sides in windows]
        if maximum:
            return _call(node, aten.max_pool2d.default, images, *sides, ceil)
        averaged = average_pool(module, _call(node, aten.avg_pool2d.default, images, *sides))
        assert averaged is not None
        return averaged

    images = over(_images(node, x), 1, 2)
    if (kernel[0], stride[0], padding[0]) != (1, 1, 0):
        _, *rest = value(images).shape  # type: ignore[union-attr]
        column = _call(node, aten.reshape.default, images, [-1, 1, sizes[1], math.prod(rest)])
        images = _call(node, aten.reshape.default, over(column, 0, 3), [-1, *rest])
    return _volumes(node, images)


def _triple(given: Any) -> list[int]:
    sizes = [given] if isinstance(given, int) else list(given)
    return sizes * 3 if len(sizes) == 1 else sizes


def _sizes(node: Any) -> list[int] | None:
    """Channels, depth, height and width of a volume; None where they vary, or it is none."""
    val = value(node) if isinstance(node, Node) else None
    if val is None or val.ndim != 5 or not all(isinstance(s, int) and s for s in val.shape[1:]):
        return None
    return list(val.shape[1:])


def _is_folded(node: Any) -> bool:
    """Whether ``node`` is what :func:`_volumes` has written."""
    if not isinstance(node, Node) or op(node) is not aten.permute.default or _sizes(node) is None:
        return False
    split, dims = node.args[0], node.args[1]
    if op(split) is not aten.reshape.default or list(dims) != _DEPTH_BEHIND_CHANNELS:  # type: ignore[arg-type, call-overload]
        return False
    images = value(split.args[0])  # type: ignore[union-attr, arg-type]
    channels, _, *rest = _sizes(node)  # type: ignore[misc]
    return images is not None and list(images.shape[1:]) == [channels, *rest]


def _images(node: Node, x: Node) -> Node:
    """The volume ``x`` as images, for ``node``."""
    if _is_folded(x):
        return x.args[0].args[0]  # type: ignore[union-attr, return-value]
    channels, _, height, width = _sizes(x)  # type: ignore[misc]
    behind = _call(node, aten.permute.default, x, _DEPTH_BEHIND_CHANNELS)
    return _call(node, aten.reshape.default, behind, [-1, channels, height, width])


def _volumes(node: Node, images: Node) -> Node:
    """``images`` as the volume that ``node`` computes."""
    _, *rest = value(images).shape  # type: ignore[union-attr]
    split = _call(node, aten.reshape.default, images, [-1, value(node).shape[2], *rest])  # type: ignore[union-attr]
    return _call(node, aten.permute.default, split, _DEPTH_BEHIND_CHANNELS)


def _neighbours(
    node: Node, images: Node, sizes: list[int], taps: int, stride: int, padding: int, dilation: int, groups: int
) -> Node:
    """For each image of the output, those that its window sees, joined by channels (within each group)."""
    channels, depth, height, width = sizes
    flat = channels * height * width
    windows = (depth + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
    rows = _call(node, aten.reshape.default, images, [-1, depth, flat])
    # Whole strides, so that every stride-th row is a slice of a view: backends have no slices with a step.
    length = windows + dilation * (taps - 1) // stride
    end = length * stride - depth - padding
    if padding or end > 0:
        rows = _call(node, aten.constant_pad_nd.default, rows, [0, 0, padding, max(end, 0)], 0.0)
    if end < 0:
        rows = _call(node, aten.slice.Tensor, rows, 1, 0, length * stride)
    if stride > 1:
        rows = _call(node, aten.reshape.default, rows, [-1, length, stride, flat])
    seen = []
    for tap in range(taps):
        start, phase = divmod(tap * dilation, stride)
        picked = rows
        if stride > 1:
            picked = _call(node, aten.slice.Tensor, picked, 2, phase, phase + 1)
        if windows != length:
            picked = _call(node, aten.slice.Tensor, picked, 1, start, start + windows)
        if stride > 1 or groups > 1:
            picked = _call(node, aten.reshape.default, picked, [-1, windows, groups, flat // groups])
        seen.append(picked)
    joined = seen[0] if taps == 1 else _call(node, aten.cat.default, seen, -1)
    return _call(node, aten.reshape.default, joined, [-1, taps * channels, height, width])


def _flat_weight(module: GraphModule, weight: Node) -> Node:
    """The weight with its depth among the channels, in place of the one it was made from."""
    name, old = str(weight.target), tensor_of(module, weight)
    with torch.no_grad():
        outputs, _, _, height, width = old.shape
        flat = old.detach().permute(_DEPTH_BEHIND_CHANNELS).reshape(outputs, -1, height, width).contiguous()
    set_tensor(module, name, flat, parameter=isinstance(old, nn.Parameter))
    new = read_attribute(module, name, weight, weight)
    tensor_of(module, new).requires_grad_(old.requires_grad)
    return new


VOLUME_REWRITES: dict[Any, Rewrite] = {
    aten.conv3d.default: convolution,
    aten.conv3d.padding: convolution,
    aten.batch_norm.default: batch_norm,
    aten.relu.default: clamp,
    aten.relu6.default: clamp,
    aten.hardtanh.default: clamp,
    aten.add.Tensor: add,
    aten.mean.dim: global_pool,
    aten.adaptive_avg_pool3d.default: global_pool,
    aten.max_pool3d.default: pool,
    aten.avg_pool3d.default: pool,
}
