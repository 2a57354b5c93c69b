"""The graph edge on which each input is quantized."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import Node

from quantflow.graph.aten import INFERENCE_IDENTITIES, node_argument, op
from quantizers.plan import Plan
from quantizers.scheme import TensorScheme

Edge = tuple[Node, Node]
Edges = Mapping[Edge, Edge]  # from the edge (input, operator) to the edge to annotate


def quantized_edges(plan: Plan) -> Edges:
    """For each input of the quantized operators, the edge to annotate.

    An operator may read its input through nodes that are the identity in inference (dropout). Then the edge before these nodes
    is annotated, so that quantize is adjacent to the operator after their removal. All readers of the identity share that edge.
    It is therefore used only if all of them read integers with the same scheme, or if the identity's input has this scheme
    anyway; otherwise the operator's own edge is annotated.
    """
    grids: dict[Edge, TensorScheme] = {}  # the scheme in which an operator reads a tensor
    written: dict[Node, TensorScheme] = {}  # the scheme of a quantized output, for all readers
    for decision in plan.integer:
        assert decision.scheme is not None
        scheme = decision.scheme.activation
        grids.update(((given, decision.node), scheme) for given in decision.activations())
        if not scheme.dynamic:
            written[decision.tail] = scheme

    def lies_on(node: Node, grid: TensorScheme) -> bool:
        return written.get(node) == grid or (_is_identity(node) and lies_on(node_argument(node), grid))

    def all_read(node: Node, grid: TensorScheme) -> bool:
        return all(
            all_read(user, grid) if _is_identity(user) else grids.get((node, user)) == grid for user in node.users
        )

    def before_identities(producer: Node, consumer: Node) -> Edge:
        grid = grids[producer, consumer]
        while _is_identity(producer) and (all_read(producer, grid) or lies_on(producer, grid)):
            producer, consumer = node_argument(producer), producer
        return producer, consumer

    return {read: before_identities(*read) for read in grids}


def _is_identity(node: Node) -> bool:
    return op(node) in INFERENCE_IDENTITIES
