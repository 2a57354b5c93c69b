"""What lowering asks of a delegate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class Delegate:
    """A backend, as partitioners that claim nodes of the edge program for it. This one is any executorch partitioners."""

    def __init__(self, partitioners: Sequence[Any] = ()) -> None:
        self._partitioners = list(partitioners)

    def partitioners(self, refused: frozenset[str] = frozenset()) -> list[Any]:
        """The partitioners. Our own leave out the edge nodes named in ``refused``; others can not."""
        return self._partitioners

    def one_by_one(self) -> list[Any]:
        """Partitioners that call the delegate for each operator alone, to find the one that it refuses; none if unknown."""
        return []

    def passes(self) -> list[Any]:
        """Passes over the edge program, before it is partitioned."""
        return []
