"""Finds the linear layers that read the features (the last dimension) of a tensor."""

from __future__ import annotations

from collections.abc import Mapping

from torch.fx import GraphModule, Node

from quantflow.graph.aten import INFERENCE_IDENTITIES, LINEARS, argument, aten, node_argument, op, value
from quantflow.ptq.channel_scaling import is_scalable

_ALIKE = INFERENCE_IDENTITIES | {aten.clone.default, aten.contiguous.default}
_RESHAPED = frozenset(
    {aten.view.default, aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int, aten.expand.default}
)
# By the arguments that name dimensions.
_MOVED: dict[object, tuple[str, ...]] = {
    aten.transpose.int: ("dim0", "dim1"),
    aten.select.int: ("dim",),
    aten.slice.Tensor: ("dim",),
    aten.squeeze.dim: ("dim",),
    aten.unsqueeze.default: ("dim",),
    aten.roll.default: ("dims",),
    aten.index_select.default: ("dim",),
}


def linear_readers(module: GraphModule, node: Node, reads: Mapping[str, int]) -> list[Node] | None:
    """The linear layers that read the features of ``node``; None if another operator does, or a layer with a shared weight."""
    found: list[Node] = []
    waiting = [node]
    while waiting:
        current = waiting.pop()
        for user in current.users:
            if op(user) in LINEARS and user.args[0] is current and is_scalable(module, user, reads):
                found.append(user)
            elif user.args and user.args[0] is current and user.all_input_nodes.count(current) == 1 and _keeps(user):
                waiting.append(user)
            else:
                return None
    return list(dict.fromkeys(found)) or None


def _keeps(node: Node) -> bool:
    """Whether ``node`` keeps the features of its first argument in the last dimension, complete and in order."""
    before, after = value(node_argument(node)), value(node)
    if before is None or after is None or before.ndim == 0:
        return False
    if op(node) in _ALIKE:
        return True
    if op(node) in _RESHAPED:  # in row-major order a last dimension of equal size holds the same
        return isinstance(before.shape[-1], int) and before.shape[-1] != 1 and before.shape[-1] == after.shape[-1]
    if op(node) is aten.permute.default:
        return argument(node, "dims")[-1] % before.ndim == before.ndim - 1
    if op(node) in (aten.pad.default, aten.constant_pad_nd.default):
        return _pads_rows(node)
    names = _MOVED.get(op(node))
    if names is None:
        return False
    rank = before.ndim + (op(node) is aten.unsqueeze.default)
    dims = [d for name in names for d in _each(argument(node, name))]
    return bool(dims) and all(d % rank != rank - 1 for d in dims)


def _pads_rows(node: Node) -> bool:
    """Whether ``node`` pads rows only, with zeros or copies of existing rows."""
    constant = op(node) is aten.constant_pad_nd.default or argument(node, "mode") == "constant"
    return list(argument(node, "pad")[:2]) == [0, 0] and not (constant and argument(node, "value"))


def _each(dims: int | list[int]) -> list[int]:
    return [dims] if isinstance(dims, int) else list(dims)
