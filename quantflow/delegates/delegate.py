"""What lowering asks of a delegate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import GraphModule

from quantflow.delegates.portable_unsupported import PORTABLE_LACKS
from quantflow.graph.rewrites import rewrite


class Delegate:
    """A backend, as partitioners that claim nodes of the edge program for it. This one is any executorch partitioners."""

    def __init__(self, partitioners: Sequence[Any] = ()) -> None:
        self._partitioners = list(partitioners)

    def partitioners(self, refused: frozenset[str] = frozenset()) -> list[Any]:
        """The partitioners. Our own leave out the edge nodes named in ``refused``; others can not."""
        return self._partitioners

    def one_by_one(self, refused: frozenset[str] = frozenset()) -> list[Any]:
        """As :meth:`partitioners`, calling the delegate for each operator alone, to find one at fault; none if unknown."""
        return []

    def rewrite(self, graph: GraphModule) -> None:
        """Write what the backend lacks, or computes wrongly, as what it has, in place and exact in float, for inference.

        What foreign partitioners take is not known here: for them a graph is left as it is.
        """
        if not self._partitioners:
            rewrite(graph, PORTABLE_LACKS)

    def passes(self) -> list[Any]:
        """Passes over the edge program, before it is partitioned."""
        return []
