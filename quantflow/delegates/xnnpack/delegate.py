"""XNNPACK: optimised CPU kernels, float and int8 in one partitioner."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule

from quantflow.delegates.delegate import Delegate
from quantflow.delegates.portable_unsupported import PORTABLE_LACKS
from quantflow.graph import modes
from quantflow.graph.batch_norm import fold_batch_norm, norm_as_arithmetic, norm_as_convolution
from quantflow.graph.rewrites import COMPOSITE_REWRITES, ROW_REWRITES, rewrite


class Xnnpack(Delegate):
    """Every operator that XNNPACK runs in float, static int8 or dynamic int8."""

    def partitioners(self, refused: frozenset[str] = frozenset()) -> list[Any]:
        """The partitioner, leaving out the edge nodes named in ``refused``."""
        from quantflow.delegates.xnnpack.partitioner import (
            Int8Partitioner,  # executorch is imported late: it costs seconds
        )

        return [Int8Partitioner(refused)]

    def one_by_one(self, refused: frozenset[str] = frozenset()) -> list[Any]:
        """The partitioner, calling the delegate for each operator alone."""
        from quantflow.delegates.xnnpack.partitioner import Int8Partitioner

        return [Int8Partitioner(refused, one_by_one=True)]

    def rewrite(self, graph: GraphModule) -> None:
        """Batch norm is folded, or written as a scale and a shift, since executorch's own fusion writes to weights that others
        read; and what portable kernels lack is written as what they have. A float convolution over rows fails in the delegate
        behind integers and where others read its weight; one over images does not.
        """
        rewrite(graph, COMPOSITE_REWRITES)
        modes.mark_switched(graph.graph.nodes)
        fold_batch_norm(graph)
        norm_as_convolution(graph)
        norm_as_arithmetic(graph)
        rewrite(graph, PORTABLE_LACKS)
        rewrite(graph, ROW_REWRITES)

    def passes(self) -> list[Any]:
        """What the edge program needs before it is partitioned."""
        from quantflow.delegates.xnnpack.int8 import one_dequantize_per_user
        from quantflow.delegates.xnnpack.layout import softmax_over_rows

        return [softmax_over_rows, one_dequantize_per_user]
