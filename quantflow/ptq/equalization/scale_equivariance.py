"""Scale equivariance: operators that commute with a positive scale of each channel."""

from __future__ import annotations

import math

from torch.fx import Node

from quantflow.graph.aten import INFERENCE_IDENTITIES, argument, aten, node_argument, op, value

# Elementwise: for channels in any dimension.
_ELEMENTWISE = INFERENCE_IDENTITIES | {
    aten.leaky_relu.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.neg.default,
    aten.abs.default,
}
# Within a channel: the number of spatial dimensions, which follow that of the channels.
_POOLS = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
    aten.upsample_nearest2d.vec: 2,
    aten.upsample_bilinear2d.vec: 2,
}
_PADS = frozenset({aten.pad.default, aten.constant_pad_nd.default})
_FLATTENS = frozenset({aten.flatten.using_ints, aten.view.default, aten.reshape.default})


def commutes(node: Node, axis: int) -> bool:
    """Whether ``node`` commutes with a positive scale of each channel, in dimension ``axis`` of its first argument.

    The output has its channels in the same dimension. Clamps are not considered: they depend on the values.
    """
    x = value(node_argument(node)) if node.args else None
    if x is None:
        return False
    if op(node) in _ELEMENTWISE:
        return True
    if op(node) is aten.prelu.default:
        return axis == 1
    if op(node) in _POOLS:
        return axis == 1 and x.ndim == _POOLS[op(node)] + 2
    if op(node) is aten.mean.dim:
        return _averages_places(node, axis, x.ndim)
    if op(node) in _PADS:
        return _pads_places(node, axis, x.ndim)
    return False


def _pads_places(node: Node, axis: int, ndim: int) -> bool:
    constant = op(node) is aten.constant_pad_nd.default or argument(node, "mode") == "constant"
    return len(argument(node, "pad")) // 2 <= ndim - 1 - axis and (not constant or not argument(node, "value"))


def _averages_places(node: Node, axis: int, ndim: int) -> bool:
    dims = [d % ndim for d in argument(node, "dim") or range(ndim)]
    return all(d != axis and (d > axis or argument(node, "keepdim")) for d in dims)


def flattened_places(node: Node) -> int | None:
    """The number of positions per channel that ``node`` flattens into [examples, features]; None if it doesn't."""
    before, after = value(node_argument(node)), value(node)
    if op(node) not in _FLATTENS or before is None or after is None or after.ndim != 2 or before.ndim < 2:
        return None
    sizes = [s for s in (*before.shape[1:], after.shape[1]) if isinstance(s, int)]
    if len(sizes) < before.ndim or math.prod(sizes[:-1]) != sizes[-1]:
        return None
    return math.prod(sizes[1:-1])
