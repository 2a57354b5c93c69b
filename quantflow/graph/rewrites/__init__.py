"""Operators as others that backends have: exact in float, for any batch. One kind of operator a file.

A table says which rewrite belongs to which operator; a quantizer or a delegate names those that its backend needs.
"""

from quantflow.graph.rewrites.activations import ACTIVATION_REWRITES
from quantflow.graph.rewrites.padding import PADDING_REWRITES
from quantflow.graph.rewrites.pools import POOL_REWRITES
from quantflow.graph.rewrites.products import PRODUCT_REWRITES
from quantflow.graph.rewrites.rewriting import Rewrite, rewrite
from quantflow.graph.rewrites.scalars import NUMBER_REWRITES
from quantflow.graph.rewrites.shapes import SHAPE_REWRITES
from quantflow.graph.rewrites.volumes import VOLUME_REWRITES

# Those over scalars, vectors and images.
REWRITES: dict[object, Rewrite] = {
    **ACTIVATION_REWRITES,
    **NUMBER_REWRITES,
    **PADDING_REWRITES,
    **POOL_REWRITES,
    **SHAPE_REWRITES,
}

__all__ = [
    "ACTIVATION_REWRITES",
    "NUMBER_REWRITES",
    "PADDING_REWRITES",
    "POOL_REWRITES",
    "PRODUCT_REWRITES",
    "REWRITES",
    "SHAPE_REWRITES",
    "VOLUME_REWRITES",
    "Rewrite",
    "rewrite",
]
