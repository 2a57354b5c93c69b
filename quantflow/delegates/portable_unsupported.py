"""What executorch's portable kernels lack and can be written in those that they have, as a table of rewrites.

Whatever a delegate leaves outside runs in these kernels, so every delegate of quantflow's own needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from quantflow.graph.rewrites import (
    EMBEDDING_BAG_REWRITES,
    EMPTY_REWRITES,
    FOLD_REWRITES,
    ORDER_REWRITES,
    PAD_REWRITES,
    ROUNDING_REWRITES,
    VOLUME_INFERENCE_REWRITES,
    WINDOW_REWRITES,
    Rewrite,
)

PORTABLE_LACKS: Mapping[Any, Rewrite] = {
    **EMBEDDING_BAG_REWRITES,
    **EMPTY_REWRITES,
    **FOLD_REWRITES,
    **ORDER_REWRITES,
    **PAD_REWRITES,
    **ROUNDING_REWRITES,
    **VOLUME_INFERENCE_REWRITES,
    **WINDOW_REWRITES,
}
