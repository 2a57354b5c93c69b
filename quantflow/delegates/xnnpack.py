"""XNNPACK: optimised CPU kernels, float and int8 in one partitioner."""

from __future__ import annotations

from typing import Any

from quantflow.delegates.delegate import Delegate


class Xnnpack(Delegate):
    """Every operator that XNNPACK runs in float, static int8 or dynamic int8."""

    def partitioners(self, refused: frozenset[str] = frozenset()) -> list[Any]:
        """The partitioner, leaving out the edge nodes named in ``refused``."""
        from quantflow.delegates.xnnpack_int8 import Int8Partitioner  # executorch is imported late: it costs seconds

        return [Int8Partitioner(refused)]

    def one_by_one(self) -> list[Any]:
        """A partitioner that calls the delegate for each operator alone."""
        from quantflow.delegates.xnnpack_int8 import Int8Partitioner

        return [Int8Partitioner(one_by_one=True)]

    def passes(self) -> list[Any]:
        """What the edge program needs before it is partitioned."""
        from quantflow.delegates.xnnpack_int8 import one_dequantize_per_user
        from quantflow.delegates.xnnpack_layout import softmax_over_rows

        return [softmax_over_rows, one_dequantize_per_user]
