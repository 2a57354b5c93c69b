"""Rewrites of expansions that their readers do anyway, exact."""

from __future__ import annotations

from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from quantflow.graph.aten import aten, is_inplace, node_argument, op, tensor_value, value
from quantflow.graph.rewrites.rewriting import Rewrite
from quantflow.upstream.operators import OpOverload

# Operators on two tensors that broadcast them.
_BROADCASTING = frozenset(
    {
        *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor),
        *(aten.maximum.default, aten.minimum.default),
    }
)


def expand(module: GraphModule, node: Node) -> Node | None:
    """Replace an expansion by its source, if it changes no shape or if each reader broadcasts the source itself."""
    source = node_argument(node)
    if value(source) is None or value(node) is None:
        return None
    if _alike(source, node):
        return source
    # A tensor without dimensions would not determine the dtype of the result.
    return source if tensor_value(source).ndim and all(_broadcasts(user, node) for user in node.users) else None


def _broadcasts(user: Node, expanded: Node) -> bool:
    """Whether ``user`` combines ``expanded`` with a tensor that already has the shape of the result."""
    if op(user) not in _BROADCASTING or value(user) is None or (is_inplace(user) and user.args[0] is expanded):
        return False
    others = [given for given in user.args[:2] if given is not expanded]
    return len(others) == 1 and isinstance(others[0], Node) and value(others[0]) is not None and _alike(others[0], user)


def _alike(node: Node, other: Node) -> bool:
    ours, theirs = tensor_value(node).shape, tensor_value(other).shape
    return len(ours) == len(theirs) and all(statically_known_true(a == b) for a, b in zip(ours, theirs, strict=True))


BROADCAST_REWRITES: dict[OpOverload, Rewrite] = dict.fromkeys(
    (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default), expand
)
