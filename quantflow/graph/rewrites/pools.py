"""Rewrites of 2-d average pools into means and depthwise convolutions, exact in float."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, is_float_tensor, node_argument, pair, tensor_value, value
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, constant_before, open_shape
from quantflow.upstream.operators import OpOverload


def mean(module: GraphModule, node: Node) -> Node | None:
    """Write a mean over height and width without ``keepdim`` as a mean with ``keepdim`` and a view."""
    x, dims, sizes = node_argument(node), argument(node, "dim"), open_shape(node)
    rank = len(tensor_value(x).shape) if value(x) is not None else 0
    if argument(node, "keepdim") or sizes is None or rank != 4 or sorted(d % 4 for d in dims or []) != [2, 3]:
        return None
    if argument(node, "dtype") is not None:
        return None
    return call_before(node, aten.reshape.default, call_before(node, aten.mean.dim, x, [2, 3], True), sizes)


def average_pool(module: GraphModule, node: Node) -> Node | None:
    """Write an average pool as a depthwise convolution, whose equal weights are exact in int8."""
    x = node_argument(node)
    val = value(x)
    kernel, padding = pair(argument(node, "kernel_size")), pair(argument(node, "padding"))
    stride = pair(argument(node, "stride") or kernel)
    whole = argument(node, "count_include_pad") or padding == [0, 0]
    if val is None or val.ndim != 4 or not isinstance(val.shape[1], int) or not is_float_tensor(node):
        return None
    if not whole or argument(node, "divisor_override"):
        return None
    steps = zip(val.shape[2:], kernel, padding, stride, strict=True)
    if argument(node, "ceil_mode") and any(not isinstance(n, int) or (n + 2 * p - k) % s for n, k, p, s in steps):
        return None  # a window extends beyond the image
    channels = val.shape[1]
    weight = constant_before(module, node, 1 / (kernel[0] * kernel[1]), (channels, 1, *kernel))
    return call_before(node, aten.conv2d.default, x, weight, None, stride, padding, [1, 1], channels)


def adaptive_pool(module: GraphModule, node: Node) -> Node | None:
    """Write an adaptive average pool with windows of equal size: as a mean for a single window, as its input for windows of one
    pixel, else as :func:`average_pool`. (In channels-last memory, a pool of one window decomposes into a mean and a restride.)
    """
    x = node_argument(node)
    val, size = value(x), pair(argument(node, "output_size"))
    sizes = list(val.shape[2:]) if val is not None and val.ndim == 4 and is_float_tensor(node) else []
    if sizes and size == [1, 1]:
        return call_before(node, aten.mean.dim, x, [2, 3], True)
    if not sizes or not all(isinstance(s, int) and o and s % o == 0 for s, o in zip(sizes, size, strict=True)):
        return None
    if sizes == size:
        return x
    window = [s // o for s, o in zip(sizes, size, strict=True)]
    return average_pool(module, call_before(node, aten.avg_pool2d.default, x, window))


POOL_REWRITES: dict[OpOverload, Rewrite] = {
    aten.mean.dim: mean,
    aten.adaptive_avg_pool2d.default: adaptive_pool,
    aten.avg_pool2d.default: average_pool,
}
