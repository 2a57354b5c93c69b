"""Rewrites of operators into operators that backends support, exact in float and for any batch size.

Each module handles one kind of operator. A table maps operators to rewrites, and a quantizer or a delegate names the tables
that its backend needs.
"""

import torch

from quantflow.graph.rewrites.activations import ACTIVATION_REWRITES
from quantflow.graph.rewrites.broadcasts import BROADCAST_REWRITES
from quantflow.graph.rewrites.composite import COMPOSITE_REWRITES
from quantflow.graph.rewrites.embedding_bags import EMBEDDING_BAG_REWRITES
from quantflow.graph.rewrites.empties import EMPTY_REWRITES
from quantflow.graph.rewrites.fold import FOLD_REWRITES, PATCH_REWRITES
from quantflow.graph.rewrites.joins import JOIN_REWRITES
from quantflow.graph.rewrites.maxima import MAXIMUM_REWRITES
from quantflow.graph.rewrites.normalization import CENTERED_NORM_REWRITES, NORMALIZATION_REWRITES
from quantflow.graph.rewrites.order import ORDER_REWRITES
from quantflow.graph.rewrites.padding import PADDING_REWRITES
from quantflow.graph.rewrites.pads import PAD_REWRITES
from quantflow.graph.rewrites.patch_products import PATCH_PRODUCT_REWRITES
from quantflow.graph.rewrites.pools import POOL_REWRITES
from quantflow.graph.rewrites.products import PRODUCT_REWRITES
from quantflow.graph.rewrites.recurrent import RECURRENT_REWRITES
from quantflow.graph.rewrites.reductions import REDUCTION_REWRITES
from quantflow.graph.rewrites.resizing import RESIZE_REWRITES
from quantflow.graph.rewrites.rewriting import Rewrite, rewrite
from quantflow.graph.rewrites.rounding import ROUNDING_REWRITES
from quantflow.graph.rewrites.row_norms import ROW_NORM_REWRITES
from quantflow.graph.rewrites.rows import ROW_REWRITES
from quantflow.graph.rewrites.scalars import NUMBER_REWRITES
from quantflow.graph.rewrites.shapes import SHAPE_REWRITES
from quantflow.graph.rewrites.slices import SLICE_REWRITES
from quantflow.graph.rewrites.softmaxes import SOFTMAX_REWRITES
from quantflow.graph.rewrites.volumes import VOLUME_INFERENCE_REWRITES, VOLUME_REWRITES
from quantflow.graph.rewrites.windows import WINDOW_REWRITES
from quantflow.upstream.operators import OpOverload

# Rewrites of operators on scalars, vectors and images.
REWRITES: dict[OpOverload, Rewrite] = {
    **ACTIVATION_REWRITES,
    **NUMBER_REWRITES,
    **PADDING_REWRITES,
    **PAD_REWRITES,
    **PATCH_REWRITES,
    **POOL_REWRITES,
    **SHAPE_REWRITES,
    **BROADCAST_REWRITES,
    **JOIN_REWRITES,
    **MAXIMUM_REWRITES,
    **REDUCTION_REWRITES,
    **RESIZE_REWRITES,
    **SLICE_REWRITES,
    **SOFTMAX_REWRITES,
}

# Rewrites for XNNPACK, of float programs and of programs to quantize alike.
XNNPACK_REWRITES: dict[OpOverload, Rewrite] = {
    **REWRITES,
    **VOLUME_REWRITES,
    **PRODUCT_REWRITES,
    **RECURRENT_REWRITES,
}

# Rewrites of operators that are not in core ATen and have no decomposition into it.
CORE_REWRITES: dict[OpOverload, Rewrite] = {
    target: apply
    for target, apply in {
        **EMPTY_REWRITES,
        **ORDER_REWRITES,
        **ROUNDING_REWRITES,
        **SLICE_REWRITES,
        **WINDOW_REWRITES,
    }.items()
    if torch.Tag.core not in target.tags
}

__all__ = [
    "ACTIVATION_REWRITES",
    "BROADCAST_REWRITES",
    "CENTERED_NORM_REWRITES",
    "COMPOSITE_REWRITES",
    "CORE_REWRITES",
    "EMBEDDING_BAG_REWRITES",
    "EMPTY_REWRITES",
    "FOLD_REWRITES",
    "NORMALIZATION_REWRITES",
    "NUMBER_REWRITES",
    "ORDER_REWRITES",
    "PADDING_REWRITES",
    "PAD_REWRITES",
    "PATCH_PRODUCT_REWRITES",
    "PATCH_REWRITES",
    "POOL_REWRITES",
    "PRODUCT_REWRITES",
    "RECURRENT_REWRITES",
    "REWRITES",
    "ROUNDING_REWRITES",
    "ROW_NORM_REWRITES",
    "ROW_REWRITES",
    "SHAPE_REWRITES",
    "VOLUME_INFERENCE_REWRITES",
    "VOLUME_REWRITES",
    "WINDOW_REWRITES",
    "XNNPACK_REWRITES",
    "Rewrite",
    "rewrite",
]
