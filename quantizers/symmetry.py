"""Which tensors lie on a grid centred on zero, because a reader knows no zero point."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch.fx import Node
from torchao.quantization.pt2e.quantizer import EdgeOrNode

from quantflow.graph.aten import op
from quantizers.annotation_edges import Edges
from quantizers.plan import Decision, Plan


def symmetric_grids(plan: Plan, edges: Edges) -> frozenset[EdgeOrNode]:
    """The edges that rules ask to be symmetric, and with them the tensors on whose grid they can lie.

    A tensor goes along, with all that it shares a grid with, where that costs no other reader a bit: there is none, or the
    layers that write it have outputs of either sign. Else the edge alone is symmetric, and the tensor requantized on it.
    """
    asked: set[EdgeOrNode] = set()
    grids: defaultdict[Node, set[Node]] = defaultdict(set)  # from each tensor to those on its grid
    for decision in plan.integer:
        assert decision.rule is not None
        asked.update(edges[given, decision.node] for given in decision.operands(decision.rule.symmetric))
        if decision.rule.output == "shared":
            for given in decision.activations():
                tensor, _ = edges[given, decision.node]
                grids[tensor].add(decision.tail)
                grids[decision.tail].add(tensor)
    writers = {decision.tail: decision for decision in plan.integer}
    found = set(asked)
    for tensor in {edge[0] for edge in asked if isinstance(edge, tuple)}:
        group = _reachable(tensor, grids)
        moved = {writers[t].node for t in group if t in writers and _moves(writers[t])}
        alone = all((t, user) in asked or user in moved for t in group for user in t.users)
        if alone or all(t in writers and (_moves(writers[t]) or _signed(writers[t])) for t in group):
            found |= group
    return frozenset(found)


def _reachable(start: Node, along: Mapping[Node, Iterable[Node]]) -> set[Node]:
    found, ahead = {start}, [start]
    while ahead:
        new = set(along.get(ahead.pop(), ())) - found
        found |= new
        ahead += new
    return found


def _moves(decision: Decision) -> bool:
    return decision.rule is not None and decision.rule.output == "shared"


def _signed(decision: Decision) -> bool:
    """Whether ``decision`` is a layer with a weight and no clamp behind it, whose output is positive as often as negative."""
    rule = decision.rule
    return rule is not None and rule.weight is not None and op(decision.tail) not in rule.clamps
