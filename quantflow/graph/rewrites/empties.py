"""Rewrites of uninitialized tensors into zeros, because only some operators for them have kernels."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, value
from quantflow.graph.rewrites.rewriting import Rewrite, call_before
from quantflow.upstream.operators import OpOverload


def zeros_for_empty(module: GraphModule, node: Node) -> Node | None:
    """Write an empty tensor as zeros of the same shape and dtype, in the memory layout of a new tensor."""
    val = value(node)
    if val is None:
        return None
    like = call_before(node, aten.zeros_like.default, argument(node, "self"))
    given = value(like)
    return like if given is None or given.dtype == val.dtype else call_before(node, aten.to.dtype, like, val.dtype)


EMPTY_REWRITES: dict[OpOverload, Rewrite] = {aten.empty_like.default: zeros_for_empty}
