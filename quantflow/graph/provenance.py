"""Keeping the trail of where a node came from short.

Export records on every node the chain of nodes it was made from, and each later pass copies the chain. One level names the
source; the rest only costs time in lowering.
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
