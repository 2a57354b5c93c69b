"""In how many calls a delegate can run its part of a graph: the order of the graph, cut where it leaves the delegate."""

from __future__ import annotations

from collections.abc import Callable, Set

from torch.fx import Graph, Node


def delegate_calls(
    graph: Graph, delegated: Set[Node], copied: Callable[[Node], bool] = lambda node: False
) -> dict[Node, int]:
    """For each node, how many times the program has gone from a delegate to other kernels and back before it.

    Delegated nodes of one stage can run in one call: no path between two of them leaves the delegate.

    Args:
        graph: A graph in topological order.
        delegated: Its nodes that the delegate runs.
        copied: Whether a delegated node that stands before its readers costs nothing (a constant, a conversion): it is
            counted with the first of them.
    """
    found: dict[Node, int] = {}
    for node in graph.nodes:
        stage = max((found[given] for given in node.all_input_nodes), default=0)
        # Even within delegates, odd between them.
        found[node] = stage + (stage % 2 == (node in delegated)) if node.op == "call_function" else stage
    for node in reversed(graph.nodes):
        if node in delegated and copied(node):
            found[node] = min((found[user] for user in node.users if user in delegated), default=found[node])
    return found
