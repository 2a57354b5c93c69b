"""Removal of nodes whose value no node reads."""

from __future__ import annotations

from torch.fx import Graph, Node

from quantflow.graph.modes import SWITCHED
from quantflow.graph.state import all_written_by


def drop_dead_code(graph: Graph, *, trains: bool = False) -> None:
    """Erase the nodes whose value no node reads, except nodes that write in place, directly or in a region.

    Args:
        graph: The graph, changed in place.
        trains: Whether the graph is trained later. Nodes that follow the mode then stay, since in training they draw random
            numbers or update statistics.
    """

    def is_kept(node: Node) -> bool:
        return node.is_impure() or bool(all_written_by(node)) or (trains and SWITCHED in node.meta)

    graph.eliminate_dead_code(is_kept)
