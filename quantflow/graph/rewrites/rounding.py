"""Rewrite of rounding to decimals into rounding to integers, exact because the operator uses the same arithmetic."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, constant_before
from quantflow.upstream.operators import OpOverload


def round_decimals(module: GraphModule, node: Node) -> Node:
    """Write rounding to ``d`` decimals as ``round(x·10ᵈ)/10ᵈ``, or ``round(x/10⁻ᵈ)·10⁻ᵈ`` for negative ``d``."""
    x, decimals = argument(node, "self"), argument(node, "decimals")
    if decimals == 0:
        return call_before(node, aten.round.default, x)
    tens = constant_before(module, node, 10.0 ** abs(decimals))
    into, back = (aten.mul.Tensor, aten.div.Tensor) if decimals > 0 else (aten.div.Tensor, aten.mul.Tensor)
    return call_before(node, back, call_before(node, aten.round.default, call_before(node, into, x, tens)), tens)


ROUNDING_REWRITES: dict[OpOverload, Rewrite] = {aten.round.decimals: round_decimals}
