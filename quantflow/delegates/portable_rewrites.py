"""A table of rewrites for operators that executorch's portable kernels lack, or compute with a loss of precision.

Operators outside a delegate run in portable kernels, so every delegate of quantflow needs this table.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantflow.graph.rewrites import (
    EMBEDDING_BAG_REWRITES,
    EMPTY_REWRITES,
    FOLD_REWRITES,
    NORMALIZATION_REWRITES,
    ORDER_REWRITES,
    PAD_REWRITES,
    ROUNDING_REWRITES,
    VOLUME_INFERENCE_REWRITES,
    WINDOW_REWRITES,
    Rewrite,
)
from quantflow.upstream.operators import OpOverload

PORTABLE_REWRITES: Mapping[OpOverload, Rewrite] = {
    **EMBEDDING_BAG_REWRITES,
    **EMPTY_REWRITES,
    **FOLD_REWRITES,
    **NORMALIZATION_REWRITES,
    **ORDER_REWRITES,
    **PAD_REWRITES,
    **ROUNDING_REWRITES,
    **VOLUME_INFERENCE_REWRITES,
    **WINDOW_REWRITES,
}
