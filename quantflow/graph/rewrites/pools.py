"""Rewrites of 2-d average pools into means and depthwise convolutions, exact in float."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, is_float_tensor, node_argument, pair, tensor_value, value
from quantflow.graph.rewrites.resizing import by_matrices
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, constant_before, open_shape, tensor_before
from quantflow.graph.rewrites.weights import EQUAL_WEIGHTS
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
    """Write an average pool as a depthwise convolution, whose equal weights are exact in int8.

    Where its windows count different numbers of pixels, at the edges, the means are multiplied by what each window lacks.
    """
    x, out = node_argument(node), value(node)
    val = value(x)
    kernel, padding = pair(argument(node, "kernel_size")), pair(argument(node, "padding"))
    stride = pair(argument(node, "stride") or kernel)
    if val is None or out is None or val.ndim != 4 or not isinstance(val.shape[1], int) or not is_float_tensor(node):
        return None
    channels, sizes, counts = val.shape[1], val.shape[2:], out.shape[2:]
    whole = (argument(node, "count_include_pad") or padding == [0, 0]) and not argument(node, "divisor_override")
    if not whole or argument(node, "ceil_mode"):
        if not all(isinstance(size, int) for size in (*sizes, *counts)):
            return None
        # The rows and columns behind the image that the last windows reach.
        behind = [
            (n - 1) * s + k - size - p for n, s, k, size, p in zip(counts, stride, kernel, sizes, padding, strict=True)
        ]
        if any(more > p for more, p in zip(behind, padding, strict=True)):
            pads = [padding[1], max(behind[1], 0), padding[0], max(behind[0], 0)]
            x, padding = call_before(node, aten.constant_pad_nd.default, x, pads, 0.0), [0, 0]
    weight = constant_before(module, node, 1 / (kernel[0] * kernel[1]), (channels, 1, *kernel))
    means = call_before(node, aten.conv2d.default, x, weight, None, stride, padding, [1, 1], channels)
    means.meta[EQUAL_WEIGHTS] = True
    if whole and not argument(node, "ceil_mode"):
        return means
    factors = _of_each_window(node, kernel, stride)
    if bool((factors == 1).all()):
        return means
    return call_before(node, aten.mul.Tensor, means, tensor_before(module, node, factors))


def _of_each_window(node: Node, kernel: list[int], stride: list[int]) -> torch.Tensor:
    """What the mean over a window of ``kernel`` pixels, zeros outside the image, is multiplied by in the pool ``node``."""
    val, settings = tensor_value(node_argument(node)), [argument(node, name) for name in _SETTINGS]
    ones = torch.ones(1, 1, *val.shape[2:], dtype=torch.float64)
    pooled = aten.avg_pool2d.default(ones, kernel, stride, *settings)
    padding = pair(argument(node, "padding"))
    ends = [(n - 1) * s + k for n, s, k in zip(pooled.shape[2:], stride, kernel, strict=True)]
    image = torch.zeros(1, 1, *(max(e, p + size) for e, p, size in zip(ends, padding, val.shape[2:], strict=True)))
    image[..., padding[0] : padding[0] + val.shape[2], padding[1] : padding[1] + val.shape[3]] = 1
    means = aten.avg_pool2d.default(image.double(), kernel, stride)[..., : pooled.shape[2], : pooled.shape[3]]
    return torch.where(means > 0, pooled / means, 1.0).to(val.dtype)


_SETTINGS = ("padding", "ceil_mode", "count_include_pad", "divisor_override")


def adaptive_pool(module: GraphModule, node: Node) -> Node | None:
    """Write an adaptive average pool with windows of equal size: as a mean for a single window, as its input for windows of one
    pixel, else as :func:`average_pool`; with uneven windows as linear layers. (In channels-last memory, a pool of one window
    decomposes into a mean and a restride.)
    """
    x = node_argument(node)
    val, size = value(x), pair(argument(node, "output_size"))
    sizes = list(val.shape[2:]) if val is not None and val.ndim == 4 and is_float_tensor(node) else []
    if sizes and size == [1, 1]:
        return call_before(node, aten.mean.dim, x, [2, 3], True)
    if not sizes or not all(isinstance(s, int) and o for s, o in zip(sizes, size, strict=True)):
        return None
    if any(s % o for s, o in zip(sizes, size, strict=True)):
        return by_matrices(module, node)
    if sizes == size:
        return x
    window = [s // o for s, o in zip(sizes, size, strict=True)]
    return average_pool(module, call_before(node, aten.avg_pool2d.default, x, window))


POOL_REWRITES: dict[OpOverload, Rewrite] = {
    aten.mean.dim: mean,
    aten.adaptive_avg_pool2d.default: adaptive_pool,
    aten.avg_pool2d.default: average_pool,
}
