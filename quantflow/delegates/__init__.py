"""Lowering to a backend: which partitioner a delegate's name stands for, and what was handed over.

This room knows the edge dialect and nothing of quantizers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quantflow.delegates import xnnpack
from quantflow.errors import QuantflowError

_PARTITIONERS: dict[str, Callable[[], list[Any]]] = {"xnnpack": xnnpack.partitioners}


def partitioners(delegate: Any) -> list[Any]:
    """The executorch partitioners for ``delegate``: a name, a partitioner, a list of them, or None for none."""
    if delegate is None:
        return []
    if isinstance(delegate, str):
        if delegate not in _PARTITIONERS:
            raise QuantflowError(
                "edge",
                f"no delegate {delegate!r}",
                node="delegate",
                remedy=f"one of {sorted(_PARTITIONERS)}, an executorch partitioner, or None for portable kernels",
            )
        return _PARTITIONERS[delegate]()
    return list(delegate) if isinstance(delegate, (list, tuple)) else [delegate]
