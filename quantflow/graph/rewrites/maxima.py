"""Rewrites of the greatest values of images (``amax``) into max pools, exact. Of several greatest values, a pool gives one the
gradient; ``amax`` shares it out.
"""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, is_float_tensor, node_argument, tensor_value, value
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, open_shape
from quantflow.upstream.operators import OpOverload


def greatest(module: GraphModule, node: Node) -> Node | None:
    """Write ``amax`` of images over channels, height or width as pools over all of them."""
    x, shape = node_argument(node), open_shape(node)
    if value(x) is None or tensor_value(x).ndim != 4 or shape is None or not is_float_tensor(node):
        return None
    dims, sizes = {dim % 4 for dim in argument(node, "dim")}, tensor_value(x).shape
    if not dims or 0 in dims or not all(isinstance(sizes[dim], int) and sizes[dim] for dim in dims):
        return None
    if window := dims - {1}:
        x = call_before(node, aten.max_pool2d.default, x, [sizes[dim] if dim in window else 1 for dim in (2, 3)])
    if 1 in dims:
        last = call_before(node, aten.permute.default, x, [0, 2, 3, 1])
        x = call_before(node, aten.max_pool2d.default, last, [1, sizes[1]])
        x = call_before(node, aten.permute.default, x, [0, 3, 1, 2])
    return x if argument(node, "keepdim") else call_before(node, aten.reshape.default, x, shape)


MAXIMUM_REWRITES: dict[OpOverload, Rewrite] = {aten.amax.default: greatest}
