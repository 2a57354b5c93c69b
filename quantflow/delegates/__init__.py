"""Backends that programs are lowered to, and the lookup of a delegate by name.

The package knows the edge dialect and nothing of quantizers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

from quantflow.delegates.delegate import Delegate
from quantflow.delegates.delegation import lowered_modules
from quantflow.delegates.xnnpack.delegate import Xnnpack
from quantflow.errors import QuantflowError

__all__ = ["Delegate", "DelegateLike", "lowered_modules", "resolve"]

if TYPE_CHECKING:
    from executorch.exir.backend.partitioner import Partitioner

# A delegate, its name, executorch partitioners, or None for portable kernels.
DelegateLike: TypeAlias = "Delegate | str | Partitioner | Sequence[Partitioner] | None"

_DELEGATES: dict[str, type[Delegate]] = {"xnnpack": Xnnpack}


def resolve(delegate: DelegateLike) -> Delegate:
    """Return the delegate for a name, an executorch partitioner, a list of partitioners, or None for no delegate."""
    if isinstance(delegate, Delegate):
        return delegate
    if isinstance(delegate, str):
        if delegate not in _DELEGATES:
            raise QuantflowError(
                "edge",
                f"no delegate {delegate!r}",
                node="delegate",
                remedy=f"one of {sorted(_DELEGATES)}, an executorch partitioner, or None for portable kernels",
            )
        return _DELEGATES[delegate]()
    if delegate is None:
        return Delegate()
    return Delegate(delegate if isinstance(delegate, (list, tuple)) else [delegate])
