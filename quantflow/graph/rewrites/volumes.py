"""Rewrites of 3-d operators into 2-d operators, exact in float, for backends without 3-d operators.

A volume ``[N, C, D, H, W]`` becomes ``N·D`` images ``[N·D, C, H, W]``. The conversion to volumes and back is left out between
two rewritten operators, so that batch norm and clamps directly follow the convolution.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quantflow.graph.aten import aten, node_argument, op, tensor_value
from quantflow.graph.modes import BATCH_NORM, CUMULATIVE, FROZEN, SWITCHED
from quantflow.graph.rewrites import volume_pools
from quantflow.graph.rewrites.reductions import mean
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, reads_input
from quantflow.graph.rewrites.scalars import scalar_operand
from quantflow.graph.rewrites.volume_convolutions import any_convolution, convolution, transposed_convolution
from quantflow.graph.rewrites.volume_form import as_images, as_volumes, is_folded, volume_sizes
from quantflow.upstream.operators import OpOverload


def batch_norm(module: GraphModule, node: Node) -> Node | None:
    """Write a batch norm after a rewritten convolution in 2-d. Its statistics over the images are the same."""
    if not is_folded(node.args[0]) or node.kwargs:
        return None
    normed = call_before(node, BATCH_NORM, as_images(node, node_argument(node)), *node.args[1:])
    normed.meta.update({key: node.meta[key] for key in (SWITCHED, FROZEN, CUMULATIVE) if key in node.meta})
    return as_volumes(node, normed)


def clamp(module: GraphModule, node: Node) -> Node | None:
    """Write a clamp after a rewritten convolution in 2-d."""
    if not is_folded(node.args[0]):
        return None
    return as_volumes(node, call_before(node, op(node), as_images(node, node_argument(node)), *node.args[1:]))


def add(module: GraphModule, node: Node) -> Node | None:
    """Write a sum of two volumes of one shape in 2-d, if one of them is already in 2-d and neither is a constant."""
    given = [x for x in node.args[:2] if isinstance(x, Node)]
    operands = [x for x in given if volume_sizes(x) is not None and volume_sizes(x) == volume_sizes(node)]
    if len(operands) != 2 or node.kwargs or not any(map(is_folded, operands)):
        return None
    first, second = (tensor_value(x).shape[0] for x in operands)
    if not statically_known_true(first == second) or not all(map(reads_input, operands)):
        return None
    return as_volumes(node, call_before(node, op(node), *(as_images(node, x) for x in operands)))


def _first_of(*rewrites: Rewrite) -> Rewrite:
    """A rewrite that applies the first applicable rewrite of ``rewrites``."""
    return lambda module, node: next((new for apply in rewrites if (new := apply(module, node)) is not None), None)


_CLAMPS = (aten.relu.default, aten.relu6.default, aten.hardtanh.default)
_BEHIND: dict[OpOverload, Rewrite] = dict.fromkeys(_CLAMPS, clamp)
_POOLS: dict[OpOverload, Rewrite] = {
    aten.adaptive_avg_pool3d.default: volume_pools.adaptive_pool,
    aten.max_pool3d.default: volume_pools.max_pool,
    aten.avg_pool3d.default: volume_pools.any_average_pool,
}
# Rewrites for training and inference.
VOLUME_REWRITES: dict[OpOverload, Rewrite] = {
    **dict.fromkeys((aten.conv3d.default, aten.conv3d.padding), convolution),
    aten.batch_norm.default: batch_norm,
    aten.add.Tensor: _first_of(add, scalar_operand),
    aten.mean.dim: _first_of(volume_pools.global_mean, mean),
    **_BEHIND,
    **_POOLS,
}
# Rewrites for inference only, which leave no 3-d operator that the backend lacks.
VOLUME_INFERENCE_REWRITES: dict[OpOverload, Rewrite] = {
    **dict.fromkeys((aten.conv3d.default, aten.conv3d.padding), any_convolution),
    aten.conv_transpose3d.input: transposed_convolution,
    aten.add.Tensor: add,
    **_BEHIND,
    **_POOLS,
}
