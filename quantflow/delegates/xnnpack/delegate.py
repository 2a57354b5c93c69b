"""The XNNPACK delegate: optimized CPU kernels, with float and int8 in one partitioner."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from quantflow.delegates.delegate import Delegate
from quantflow.delegates.portable_rewrites import PORTABLE_REWRITES
from quantflow.graph import modes
from quantflow.graph.batch_norm import norm_as_arithmetic, norm_as_convolution
from quantflow.graph.folding import fold_for_inference
from quantflow.graph.rewrites import COMPOSITE_REWRITES, ROW_NORM_REWRITES, ROW_REWRITES, XNNPACK_REWRITES, rewrite

if TYPE_CHECKING:
    from executorch.exir.backend.partitioner import Partitioner
    from executorch.exir.pass_manager import PassType


class Xnnpack(Delegate):
    """The delegate for XNNPACK, which runs operators in float, static int8 or dynamic int8."""

    lacks = frozenset({torch.bfloat16})

    def partitioners(self, refused: frozenset[str] = frozenset()) -> list[Partitioner]:
        """Return the partitioner, which leaves out the edge nodes named in ``refused``."""
        from quantflow.delegates.xnnpack.partitioner import (
            Int8Partitioner,  # the import of executorch takes seconds, so it is late
        )

        return [Int8Partitioner(refused)]

    def one_by_one(self, refused: frozenset[str] = frozenset()) -> list[Partitioner]:
        """Return the partitioner that delegates each operator in a call of its own."""
        from quantflow.delegates.xnnpack.partitioner import Int8Partitioner

        return [Int8Partitioner(refused, one_by_one=True)]

    def rewrite(self, graph: GraphModule) -> None:
        """Replace operators that XNNPACK lacks, fold batch norm or write it as a scale and a shift, and replace operators that
        portable kernels lack.

        executorch's own batch norm fusion overwrites weights that other layers share. The delegate fails on a float 1-d
        convolution beside an int8 operator or with a shared weight, so such a convolution becomes a 2-d one.
        """
        rewrite(graph, COMPOSITE_REWRITES)
        modes.mark_switched(graph.graph.nodes)
        fold_for_inference(graph)
        norm_as_convolution(graph)
        norm_as_arithmetic(graph)
        rewrite(graph, XNNPACK_REWRITES)
        rewrite(graph, ROW_NORM_REWRITES)
        rewrite(graph, PORTABLE_REWRITES)
        rewrite(graph, ROW_REWRITES)

    def passes(self) -> list[PassType]:
        """Return the passes that run on the edge program before it is partitioned."""
        from quantflow.delegates.xnnpack.int8 import one_dequantize_per_user
        from quantflow.delegates.xnnpack.layout import softmax_over_rows
        from quantflow.delegates.xnnpack.packed_weights import four_bits_as_eight

        return [softmax_over_rows, one_dequantize_per_user, four_bits_as_eight]
