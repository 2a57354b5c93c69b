"""Rewrites of a softmax over any dimension into one over the last, exact."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, op, tensor_value, value
from quantflow.graph.rewrites.rewriting import Rewrite, call_before
from quantflow.upstream.operators import OpOverload


def softmax(module: GraphModule, node: Node) -> Node | None:
    """Write a softmax over another dimension than the last as one over the last between two transposes."""
    if value(node) is None or tensor_value(node).ndim < 2 or argument(node, "dtype") is not None:
        return None
    last = tensor_value(node).ndim - 1
    if (dim := argument(node, "dim") % (last + 1)) == last:
        return None
    rows = call_before(node, aten.transpose.int, argument(node, "self"), dim, last)
    return call_before(node, aten.transpose.int, call_before(node, op(node), rows, last), dim, last)


SOFTMAX_REWRITES: dict[OpOverload, Rewrite] = {aten.softmax.int: softmax}
