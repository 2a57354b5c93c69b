"""Rewrites of 3-d pools into pools over images and over depth, exact in float."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, is_float_tensor, node_argument, tensor_value, value
from quantflow.graph.rewrites.pools import average_pool
from quantflow.graph.rewrites.rewriting import call_before, open_shape, tensor_before
from quantflow.graph.rewrites.volume_form import as_images, as_volumes, triple, volume_sizes


def global_mean(module: GraphModule, node: Node) -> Node | None:
    """Write the mean of a whole volume as a 2-d mean, with depth and height merged into one dimension."""
    sizes = volume_sizes(node.args[0])
    whole = sizes is not None and sorted(d % 5 for d in argument(node, "dim") or []) == [2, 3, 4]
    return _mean(node) if whole and argument(node, "dtype") is None else None


def adaptive_pool(module: GraphModule, node: Node) -> Node | None:
    """Write an adaptive average pool as a mean for a single window, else as pools over images and then over depth."""
    x = node_argument(node)
    sizes, size = volume_sizes(x), triple(argument(node, "output_size"))
    if sizes is None or volume_sizes(node) is None or not is_float_tensor(node):
        return None
    if size == [1, 1, 1]:
        return _mean(node)
    depth, height, width = (given if want is None else want for want, given in zip(size, sizes[1:], strict=True))
    images = call_before(node, aten.adaptive_avg_pool2d.default, as_images(node, x), [height, width])
    return as_volumes(
        node, _over_depth(node, images, sizes[1], lambda c: _adaptive(node, c, depth), changes=depth != sizes[1])
    )


def max_pool(module: GraphModule, node: Node) -> Node | None:
    """Write a max pool as pools over height and width and then over depth."""
    sizes = volume_sizes(node.args[0])
    if sizes is None or volume_sizes(node) is None:
        return None
    kernel, padding, dilation = (triple(argument(node, name)) for name in ("kernel_size", "padding", "dilation"))
    stride, ceil = triple(argument(node, "stride") or kernel), argument(node, "ceil_mode")

    def over(images: Node, *dims: int) -> Node:
        sides = [[side[d] for d in dims] for side in ([*kernel, 1], [*stride, 1], [*padding, 0], [*dilation, 1])]
        return call_before(node, aten.max_pool2d.default, images, *sides, ceil)

    images = over(as_images(node, node_argument(node)), 1, 2)
    changes = (kernel[0], stride[0], padding[0]) != (1, 1, 0)
    return as_volumes(node, _over_depth(node, images, sizes[1], lambda column: over(column, 0, 3), changes=changes))


def any_average_pool(module: GraphModule, node: Node) -> Node | None:
    """Write an average pool as pools over height and width and then over depth. A multiplication corrects the divisor of
    windows of different size.
    """
    sizes, val = volume_sizes(node.args[0]), value(node)
    if sizes is None or val is None or volume_sizes(node) is None or not is_float_tensor(node):
        return None
    kernel, padding = triple(argument(node, "kernel_size")), triple(argument(node, "padding"))
    stride, x = triple(argument(node, "stride") or kernel), node_argument(node)
    behind = [
        max((windows - 1) * s + k - size - p, 0)
        for windows, s, k, size, p in zip(val.shape[2:], stride, kernel, sizes[1:], padding, strict=True)
    ]
    if any(padding) or any(behind):
        pads = [n for side in zip(reversed(padding), reversed(behind), strict=True) for n in side]
        x = call_before(node, aten.constant_pad_nd.default, x, pads, 0.0)

    def over(images: Node, *dims: int) -> Node:
        sides = [[side[d] for d in dims] for side in ([*kernel, 1], [*stride, 1])]
        averaged = average_pool(module, call_before(node, aten.avg_pool2d.default, images, *sides))
        assert averaged is not None
        return averaged

    images = over(as_images(node, x), 1, 2)
    depth = tensor_value(x).shape[2]
    changes = (kernel[0], stride[0]) != (1, 1)
    pooled = as_volumes(node, _over_depth(node, images, depth, lambda column: over(column, 0, 3), changes=changes))
    share = math.prod(kernel) / _divisors(node, sizes[1:], kernel, stride, padding)
    if bool((share == 1).all()):
        return pooled
    return call_before(node, aten.mul.Tensor, pooled, tensor_before(module, node, share.to(val.dtype)))


def _divisors(node: Node, sizes: list[int], kernel: list[int], stride: list[int], padding: list[int]) -> torch.Tensor:
    """The divisor of each window's sum in the operator, float64, [depth, height, width] of its output."""
    override = argument(node, "divisor_override")
    lengths = []
    for size, k, s, p, windows in zip(sizes, kernel, stride, padding, tensor_value(node).shape[2:], strict=True):
        start = torch.arange(windows) * s - p
        end = (start + k).clamp(max=size + p)  # the part of a window beyond the padding does not count
        if not argument(node, "count_include_pad"):
            start, end = start.clamp(min=0), end.clamp(max=size)
        lengths.append((end - start).double())
    depth, height, width = lengths
    counted = depth[:, None, None] * height[:, None] * width
    return torch.full_like(counted, override) if override else counted


def _mean(node: Node) -> Node | None:
    x, shape = node.args[0], open_shape(node)
    sizes = volume_sizes(x)
    if sizes is None or shape is None:
        return None
    channels, depth, height, width = sizes
    image = call_before(node, aten.reshape.default, x, [-1, channels, depth * height, width])
    return call_before(node, aten.reshape.default, call_before(node, aten.mean.dim, image, [2, 3], True), shape)


def _adaptive(node: Node, column: Node, depth: int) -> Node:
    width = tensor_value(column).shape[3]
    return call_before(node, aten.adaptive_avg_pool2d.default, column, [depth, width])


def _over_depth(node: Node, images: Node, depth: int, pool: Callable[[Node], Node], *, changes: bool) -> Node:
    """``images``, ``depth`` per volume, pooled over the depth. ``pool`` gets images whose height is the depth."""
    if not changes:
        return images
    _, *rest = tensor_value(images).shape
    column = call_before(node, aten.reshape.default, images, [-1, 1, depth, math.prod(rest)])
    return call_before(node, aten.reshape.default, pool(column), [-1, *rest])
