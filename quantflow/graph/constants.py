"""Detection and evaluation of values that follow from parameters, buffers and static shapes alone."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable
from typing import Any, TypeGuard

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from quantflow.graph.aten import INFERENCE_IDENTITIES, aten, op
from quantflow.graph.parameters import device_of, is_constant, tensor_of
from quantflow.graph.state import all_written_by, is_written, memories
from quantflow.upstream import pytree
from quantflow.upstream.operators import OpOverload

# Operators of which the first argument gives a dtype, a device and perhaps a shape, but no values.
_LIKE = frozenset(
    {
        *(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default, aten.empty_like.default),
        *(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default),
    }
)


_CALLS = (
    1000  # the number of calls up to which one node is traced back, so that a pass over all nodes takes linear time
)


def constant_calls(graph: Graph, *, sizes_known: bool = False) -> set[Node]:
    """Return the calls whose values follow from constants alone. Memory that one of them writes in place is written by them
    only, and is complete before another node reads it.

    Args:
        graph: A captured graph.
        sizes_known: Count sizes that vary as constants, which they are in a program of static shapes.
    """
    order, memory_of, names = memories(graph)
    barred = set[Node]()
    while True:
        found = set[Node]()
        for node in graph.nodes:
            if memory_of[node] not in barred and _is_constant_call(node, found, sizes_known):
                found.add(node)
        mixed = set[Node]()
        for node in graph.nodes:
            for memory in {memory_of[base] for base in all_written_by(node)}:
                readers = {user for name in names[memory] for user in name.users} - found
                if node not in found or any(order[reader] < order[node] for reader in readers):
                    mixed.add(memory)
        if mixed <= barred:
            return found
        barred |= mixed


def _is_constant_call(node: Node, known: Collection[Node], sizes_known: bool = False) -> bool:
    """Whether ``node`` calls a deterministic operator on constants and on calls that are ``known`` to be constant."""
    if node.op != "call_function" or not _is_deterministic(node.target):
        return False
    if not _is_static(node.meta.get("val"), sizes_known) and node.target is not aten._assert_tensor_metadata.default:
        return False
    given = node.all_input_nodes
    if node.target in _LIKE and given[:1] == [node.args[0]] and _is_static(given[0].meta.get("val"), sizes_known):
        given = given[1:]
    if sizes_known:
        given = [n for n in given if not isinstance(n.meta.get("val"), (int, torch.SymInt))]
    return all(n in known or is_constant(n) for n in given)


def _is_deterministic(target: object) -> bool:
    if target is operator.getitem or target in INFERENCE_IDENTITIES:
        return True
    random = torch.Tag.nondeterministic_seeded
    return isinstance(target, OpOverload) and target.namespace == "aten" and random not in target.tags


def _is_static(val: object, sizes_known: bool = False) -> bool:
    """Whether ``val``, the trace's value of a node, is made of tensors whose shapes do not vary or are known."""
    leaves = pytree.tree_leaves(val)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return len(tensors) == len(leaves) > 0 and (
        sizes_known or all(isinstance(size, int) for t in tensors for size in t.shape)
    )


def follows_from_constants(node: object) -> TypeGuard[Node]:
    """Whether ``node`` is a constant or follows from constants alone, by a limited number of calls, none of which writes in
    place. For all nodes of a graph, :func:`constant_calls` is cheaper.
    """
    if not isinstance(node, Node):
        return False
    seen, ahead = set[Node](), [node]
    while ahead:
        inner = ahead.pop()
        if inner in seen or is_constant(inner):
            continue
        given = inner.all_input_nodes
        if not _is_constant_call(inner, given) or all_written_by(inner) or is_written(inner) or len(seen) >= _CALLS:
            return False
        seen.add(inner)
        ahead += given[1:] if inner.target in _LIKE else given
    return True


def _cone(nodes: Iterable[Node]) -> list[Node]:
    """``nodes`` and all that they follow from, in the order of the graph. What gives only a dtype and a shape is left out."""
    seen: set[Node] = set()
    ahead = list(nodes)
    while ahead:
        node = ahead.pop()
        if node not in seen:
            seen.add(node)
            ahead += node.all_input_nodes[1:] if node.target in _LIKE else node.all_input_nodes
    return sorted(seen)


@torch.no_grad()
def constant_values(module: GraphModule, nodes: Collection[Node]) -> dict[Node, torch.Tensor]:
    """Return the values of ``nodes``, which follow from constants alone, as tensors of their own."""
    values: dict[Node, Any] = {}
    device = device_of(module)
    for node in _cone(nodes):
        values[node] = tensor_of(module, node).detach() if node.op == "get_attr" else _called(node, values, device)
    return {node: values[node].detach().clone() for node in nodes}


def _called(node: Node, values: dict[Node, Any], device: torch.device | None) -> Any:
    def given(argument: Node) -> Any:
        if argument in values:
            return values[argument]
        val = argument.meta["val"]  # its values are not read
        return torch.empty((), dtype=val.dtype, device=device).expand(val.shape)

    if op(node) in INFERENCE_IDENTITIES:
        return values[node.all_input_nodes[0]]
    args, kwargs = map_arg((node.args, node.kwargs), given)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def constants_before(nodes: Iterable[Node]) -> list[Node]:
    """Return the constants that ``nodes`` follow from."""
    return [node for node in _cone(nodes) if node.op == "get_attr"]
