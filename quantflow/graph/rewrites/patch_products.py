"""Rewrites of convolutions and linear layers over images into linear layers over rows, exact up to the order of sums.

A backend may have a dynamic form of linear layers and none, or a wrong one, of convolutions. Each position then is a row, with
a range of its own. XNNPACK's dynamic convolution of executorch 1.5 gives wrong results beside other readers of its input.
"""

from __future__ import annotations

import itertools

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, only_user, op, tensor_value, value
from quantflow.graph.batch_norm import normed_layer
from quantflow.graph.rewrites.padding import same_padding
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, open_shape
from quantflow.graph.rewrites.slices import every
from quantflow.graph.rewrites.weights import EQUAL_WEIGHTS
from quantflow.upstream.operators import OpOverload

_NAMED = frozenset({aten.conv1d.padding, aten.conv2d.padding})


def convolution_as_linear(module: GraphModule, node: Node) -> Node | None:
    """Write a convolution over lines or images as a linear layer over patches, if its sizes are known and it has one group."""
    x, weight, out = argument(node, "input"), argument(node, "weight"), value(node)
    kernel, val = value(weight), value(x)
    user = only_user(node)
    if EQUAL_WEIGHTS in node.meta:
        return None  # sums gain nothing from integers
    if user is not None and normed_layer(user) is not None:
        return None  # training keeps batch norm, and folds it into a convolution only
    if kernel is None or val is None or out is None or val.ndim != kernel.ndim or argument(node, "groups") != 1:
        return None
    if not all(isinstance(size, int) for size in (*val.shape[1:], *out.shape[1:])):
        return None
    if op(node) in _NAMED:
        numbered = same_padding(module, node)
        return None if numbered is None else convolution_as_linear(module, numbered)
    sides = val.ndim - 2
    stride, padding, dilation = (
        (list(given) * sides)[:sides] for given in (argument(node, name) for name in ("stride", "padding", "dilation"))
    )
    last = [0, *range(2, val.ndim), 1]  # channels last
    rows = call_before(node, aten.permute.default, x, last)
    if any(padding):
        pads = [0, 0, *(p for size in reversed(padding) for p in (size, size))]
        rows = call_before(node, aten.constant_pad_nd.default, rows, pads, 0.0)
    parts = []
    for place in itertools.product(*map(range, kernel.shape[2:])):
        part: Node | None = rows
        for dim, (position, apart, step) in enumerate(zip(place, dilation, stride, strict=True), 1):
            if part is not None and (kernel.shape[dim + 1] > 1 or step > 1):
                part = every(node, part, dim, position * apart, out.shape[dim + 1], step)
        if part is None:
            return None
        parts.append(part)
    patches = call_before(node, aten.cat.default, parts, val.ndim - 1) if len(parts) > 1 else parts[0]
    channels_last = call_before(node, aten.permute.default, weight, last)
    flat = call_before(node, aten.reshape.default, channels_last, [kernel.shape[0], -1])
    product = _over_rows(node, patches, flat, argument(node, "bias"))
    first = [0, val.ndim - 1, *range(1, val.ndim - 1)]
    return None if product is None else call_before(node, aten.permute.default, product, first)


def linear_over_rows(module: GraphModule, node: Node) -> Node | None:
    """Write a linear layer over images as one over rows. XNNPACK's compiler fails on a dynamic one in channels-last memory."""
    x = argument(node, "input")
    if value(x) is None or tensor_value(x).ndim != _IMAGES:
        return None
    return _over_rows(node, x, argument(node, "weight"), argument(node, "bias"))


def _over_rows(node: Node, x: Node, weight: Node, bias: Node | None) -> Node | None:
    """Insert a linear layer over the rows of ``x`` before ``node``, with a result in the shape of ``x``."""
    features, shape = tensor_value(x).shape[-1], open_shape(x)
    if shape is None or not isinstance(features, int):
        return None
    rows = call_before(node, aten.reshape.default, x, [-1, features])
    product = call_before(node, aten.linear.default, rows, weight, bias)
    return call_before(node, aten.reshape.default, product, [*shape[:-1], tensor_value(product).shape[-1]])


_IMAGES = 4  # dimensions

PATCH_PRODUCT_REWRITES: dict[OpOverload, Rewrite] = {
    **dict.fromkeys((aten.conv1d.default, aten.conv2d.default, *_NAMED), convolution_as_linear),
    aten.linear.default: linear_over_rows,
}
