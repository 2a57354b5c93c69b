"""Partitioning of a graph into as few delegate calls as its order allows."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Set

from torch.fx import Graph, Node


def delegate_calls(
    graph: Graph, delegated: Set[Node], copied: Callable[[Node], bool] = lambda node: False
) -> dict[Node, int]:
    """Return, for each node, how many times the program switches between the delegate and other kernels before it.

    Delegated nodes with the same number can run in one call: no path between two of them leaves the delegate.

    Args:
        graph: A graph in topological order.
        delegated: The nodes of the graph that the delegate runs.
        copied: Whether a delegated node can move to its readers at no cost (a constant, a conversion). It then gets the number
            of its first reader.
    """
    found: dict[Node, int] = {}
    for node in graph.nodes:
        stage = max((found[given] for given in node.all_input_nodes), default=0)
        # Stages are even inside the delegate and odd outside.
        found[node] = stage + (stage % 2 == (node in delegated)) if node.op == "call_function" else stage
    _delay(found, delegated)
    for node in reversed(graph.nodes):
        if node in delegated and copied(node):
            found[node] = min((found[user] for user in node.users if user in delegated), default=found[node])
    return found


def _delay(found: dict[Node, int], delegated: Set[Node]) -> None:
    """Move the nodes of a stage to the next stage of the delegate, if no other kernel before that one reads them."""
    by_stage: dict[int, list[Node]] = {}
    for node, stage in found.items():
        if node in delegated and node.op == "call_function":
            by_stage.setdefault(stage, []).append(node)
    for stage, following in itertools.pairwise(sorted(by_stage)):
        readers = [user for node in by_stage[stage] for user in node.users if user.op == "call_function"]
        if all(found[user] > following for user in readers if user not in delegated):
            found.update(dict.fromkeys(by_stage[stage], following))
            by_stage[following] += by_stage[stage]
