"""Rewrites of shape operators and splits into views and slices."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, node_argument, op, tensor_value
from quantflow.graph.rewrites.rewriting import Replacement, Rewrite, call_before, open_shape
from quantflow.upstream.operators import OpOverload


def reshape(module: GraphModule, node: Node) -> Node | None:
    """Write a change of shape as a view."""
    sizes = open_shape(node)
    return None if sizes is None else call_before(node, aten.reshape.default, node.args[0], sizes)


def select(module: GraphModule, node: Node) -> Node | None:
    """Write a select as a slice and a view."""
    sizes, dim, index = open_shape(node), argument(node, "dim"), argument(node, "index")
    if sizes is None or not isinstance(index, int):
        return None
    if index < 0:
        size = tensor_value(node_argument(node)).shape[dim]
        if not isinstance(size, int):
            return None
        index += size
    picked = call_before(node, aten.slice.Tensor, node.args[0], dim, index, index + 1)
    return call_before(node, aten.reshape.default, picked, sizes)


def split(module: GraphModule, node: Node) -> Replacement:
    """Write a split as one slice for each part. An ``unbind`` also drops the dimension."""
    dim, start, drops = argument(node, "dim"), 0, op(node) is aten.unbind.int
    parts = node.meta.get("val")
    users = list(node.users)
    if not isinstance(parts, (list, tuple)) or any(getattr(u.target, "__name__", "") != "getitem" for u in users):
        return None
    if any((open_shape(u) is None) if drops else not isinstance(tensor_value(u).shape[dim], int) for u in users):
        return None
    read = {user.args[1]: open_shape(user) for user in users}
    slices = {}
    for index, part in enumerate(parts):
        end = start + (1 if drops else part.shape[dim])
        if index in read:
            if not isinstance(start, int):
                return None
            new = call_before(node, aten.slice.Tensor, node.args[0], dim, start, end)
            slices[index] = call_before(node, aten.reshape.default, new, read[index]) if drops else new
        start = end
    return slices


def cat(module: GraphModule, node: Node) -> Node | None:
    """Replace a concatenation of a single tensor by the tensor."""
    tensors = argument(node, "tensors")
    return tensors[0] if len(tensors) == 1 else None


def alias(module: GraphModule, node: Node) -> Node | None:
    """Replace an alias by its tensor. A slice over the whole tensor is traced as an alias."""
    return node_argument(node)


SHAPE_REWRITES: dict[OpOverload, Rewrite] = {
    aten.select.int: select,
    aten.cat.default: cat,
    aten.alias.default: alias,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), reshape),
    **dict.fromkeys((aten.unsqueeze.default, aten.unflatten.int), reshape),
    **dict.fromkeys(
        (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.split.sizes, aten.unbind.int), split
    ),
}
