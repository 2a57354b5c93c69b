"""On which edge of the graph each input is quantized."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch.fx import Node

from quantflow.aten import INFERENCE_IDENTITIES, op
from quantizers.plan import Plan
from quantizers.scheme import TensorScheme

Edge = tuple[Node, Node]
Edges = Mapping[Edge, Edge]  # from what an operator reads, and the operator, to where that is quantized


def quantized_edges(plan: Plan) -> Edges:
    """For each input of the operators that become integers, the edge to annotate.

    It is the one before what is the identity in inference (dropout), so that integers meet the layer, unless others read that
    identity on another grid.
    """
    found: dict[Edge, Edge] = {}
    grids: defaultdict[Edge, set[TensorScheme]] = defaultdict(set)
    for decision in plan.integer:
        assert decision.scheme is not None
        for given in decision.activations():
            edge = found[given, decision.node] = _before_identities(given, decision.node)
            grids[edge].add(decision.scheme.activation)
    return {read: edge if len(grids[edge]) == 1 else read for read, edge in found.items()}


def _before_identities(producer: Node, consumer: Node) -> Edge:
    while op(producer) in INFERENCE_IDENTITIES:
        producer, consumer = producer.args[0], producer  # type: ignore[assignment]
    return producer, consumer
