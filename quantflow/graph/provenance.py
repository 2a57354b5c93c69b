"""Shortening of the provenance that export records on nodes.

Export records on every node the chain of nodes that it was created from, and each later pass copies the chain. One level names
the source. The other levels only cost time in lowering.
"""

from __future__ import annotations

from torch.fx import Graph

_KEY = "from_node"


def shorten(graph: Graph) -> None:
    """Keep one level of provenance on each node of ``graph``."""
    for node in graph.nodes:
        chain = node.meta.get(_KEY)
        if chain:
            last = chain[-1]
            last.from_node = []
            node.meta[_KEY] = [last]
