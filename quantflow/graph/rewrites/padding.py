"""Rewrites of convolutions with named padding into convolutions with numeric padding."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, node_argument, op, value
from quantflow.graph.rewrites.rewriting import Rewrite, call_before
from quantflow.upstream.operators import OpOverload

_NUMBERED = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}


def same_padding(module: GraphModule, node: Node) -> Node | None:
    """Write a convolution with ``padding="same"`` with numbers. A pad that is longer at the end becomes a separate operator."""
    x, padding = node_argument(node), argument(node, "padding")
    weight, val = value(argument(node, "weight")), value(x)
    if padding not in ("same", "valid") or weight is None or val is None or val.ndim != weight.ndim:
        return None
    spatial = weight.ndim - 2
    dilation = list(argument(node, "dilation"))
    dilation = dilation * spatial if len(dilation) == 1 else dilation
    totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if any(total % 2 for total in totals):
        longer = [n for total in reversed(totals) for n in (0, total % 2)]
        x = call_before(node, aten.constant_pad_nd.default, x, longer, 0.0)
    given = [argument(node, name) for name in ("weight", "bias", "stride")]
    halves = [total // 2 for total in totals]
    return call_before(
        node, _NUMBERED[op(node)], x, *given, halves, argument(node, "dilation"), argument(node, "groups")
    )


PADDING_REWRITES: dict[OpOverload, Rewrite] = dict.fromkeys(_NUMBERED, same_padding)
