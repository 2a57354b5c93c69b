"""The folding of constants and batch norm, which every inference path of a captured graph begins with."""

from __future__ import annotations

from torch.fx import GraphModule

from quantflow.graph.batch_norm import fold_batch_norm
from quantflow.graph.constant_folding import fold_constants
from quantflow.graph.flattened_norm import flatten_before_linear


def fold_for_inference(module: GraphModule) -> None:
    """Compute constants, and fold batch norm into the layers before it, in place. The caller recompiles."""
    flatten_before_linear(module)
    fold_constants(module)
    fold_batch_norm(module)
