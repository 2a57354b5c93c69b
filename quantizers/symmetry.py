"""Propagation of symmetric quantization from operators whose kernels have no zero point."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from torch.fx import Node
from torchao.quantization.pt2e.quantizer import EdgeOrNode

from quantflow.graph.aten import op
from quantizers.annotation_edges import Edges
from quantizers.decision import Decision
from quantizers.plan import Plan


def symmetric_grids(plan: Plan, edges: Edges) -> frozenset[EdgeOrNode]:
    """The edges that rules require to be symmetric, and the tensors that become symmetric with them.

    A tensor, with all tensors that share its quantization parameters, becomes symmetric if no other reader loses precision:
    there is no other reader, or the outputs of the layers that produce it have both signs. Otherwise only the edge is
    symmetric, and the tensor is requantized on it.
    """
    asked: set[EdgeOrNode] = set()
    grids: defaultdict[Node, set[Node]] = defaultdict(set)  # tensors that share their scale
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
    """Whether ``decision`` is a layer with a weight and without a clamp, whose output has both signs."""
    rule = decision.rule
    return rule is not None and rule.weight is not None and op(decision.tail) not in rule.clamps
