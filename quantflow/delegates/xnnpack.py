"""XNNPACK: optimised CPU kernels."""

from __future__ import annotations

from typing import Any


def partitioners() -> list[Any]:
    """XNNPACK's partitioner: float, static int8 and dynamic int8 in one."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    return [XnnpackPartitioner()]
