"""On which edge of the graph each input is quantized."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from quantflow.graph.aten import INFERENCE_IDENTITIES, op
from quantizers.plan import Plan
from quantizers.scheme import TensorScheme

Edge = tuple[Node, Node]
Edges = Mapping[Edge, Edge]  # from what an operator reads, and the operator, to where that is quantized


def quantized_edges(plan: Plan) -> Edges:
    """For each input of the operators that become integers, the edge to annotate.

    It is the one before what is the identity in inference (dropout), so that integers meet the layer. That edge is everyone's
    who reads the identity: it is taken where they all read integers on this grid, or where the identity's input lies on it
    anyway. Else the layer's own edge is.
    """
    grids: dict[Edge, TensorScheme] = {}  # on which grid an operator reads a tensor
    written: dict[Node, TensorScheme] = {}  # on which grid a tensor lies for whoever reads it
    for decision in plan.integer:
        assert decision.scheme is not None
        scheme = decision.scheme.activation
        grids.update(((given, decision.node), scheme) for given in decision.activations())
        if not scheme.dynamic:
            written[decision.tail] = scheme

    def lies_on(node: Node, grid: TensorScheme) -> bool:
        return written.get(node) == grid or (_is_identity(node) and lies_on(node.args[0], grid))  # type: ignore[arg-type]

    def all_read(node: Node, grid: TensorScheme) -> bool:
        return all(
            all_read(user, grid) if _is_identity(user) else grids.get((node, user)) == grid for user in node.users
        )

    def before_identities(producer: Node, consumer: Node) -> Edge:
        grid = grids[producer, consumer]
        while _is_identity(producer) and (all_read(producer, grid) or lies_on(producer, grid)):
            producer, consumer = producer.args[0], producer  # type: ignore[assignment]
        return producer, consumer

    return {read: before_identities(*read) for read in grids}


def _is_identity(node: Node) -> bool:
    return op(node) in INFERENCE_IDENTITIES
