"""Nodes whose value nobody reads."""

from __future__ import annotations

from torch.fx import Graph, Node

from quantflow.graph.modes import SWITCHED
from quantflow.graph.state import all_written_by


def drop_dead_code(graph: Graph, *, trains: bool = False) -> None:
    """Erase the nodes whose value nobody reads, but those that write, regions included.

    Args:
        graph: Changed in place.
        trains: Whether it is to be trained: what follows the mode stays, since in training it draws or moves statistics.
    """

    def is_kept(node: Node) -> bool:
        return node.is_impure() or bool(all_written_by(node)) or (trains and SWITCHED in node.meta)

    graph.eliminate_dead_code(is_kept)
