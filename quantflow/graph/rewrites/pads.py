"""Rewrites of negative pads into slices, exact."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, has_argument, value
from quantflow.graph.rewrites.rewriting import Rewrite, call_before
from quantflow.upstream.operators import OpOverload


def negative_pad(module: GraphModule, node: Node) -> Node | None:
    """Write a constant pad with negative sizes as slices, followed by a pad for positive sizes."""
    x, pads = argument(node, "self"), argument(node, "pad")
    if has_argument(node, "mode") and argument(node, "mode") != "constant":
        return None
    val = value(x)
    if val is None or not all(isinstance(size, int) for size in pads) or min(pads, default=0) >= 0:
        return None
    for index in range(0, len(pads), 2):
        dim = val.ndim - 1 - index // 2
        cut = [max(-size, 0) for size in pads[index : index + 2]]
        if any(cut):
            size = val.shape[dim]
            end = size - cut[1] if isinstance(size, int) else -cut[1] or _FAR
            x = call_before(node, aten.slice.Tensor, x, dim, cut[0], end)
    if max(pads) <= 0:
        return x
    positive = [max(size, 0) for size in pads]
    return call_before(node, aten.constant_pad_nd.default, x, positive, argument(node, "value") or 0.0)


_FAR = 2**63 - 1  # the end of a slice that reaches the end of its tensor

PAD_REWRITES: dict[OpOverload, Rewrite] = dict.fromkeys((aten.pad.default, aten.constant_pad_nd.default), negative_pad)
