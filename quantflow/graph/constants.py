"""Detection and evaluation of values that follow from parameters, buffers and static shapes alone."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Iterable
from typing import Any, TypeGuard

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from quantflow.graph.aten import INFERENCE_IDENTITIES, argument, aten, has_argument, op
from quantflow.graph.modes import BATCH_NORM, SWITCHED, is_training
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
    found = set[Node]()
    for node in graph.nodes:
        if _is_constant_call(node, found, sizes_known):
            found.add(node)
    order, memory_of, names = memories(graph)
    writes = defaultdict[Node, list[Node]](list)
    for node in graph.nodes:
        for memory in {memory_of[base] for base in all_written_by(node)}:
            writes[memory].append(node)

    def is_mixed(memory: Node) -> bool:
        last = order[writes[memory][-1]]
        readers = {user for name in names[memory] for user in name.users} - found
        return not found.issuperset(writes[memory]) or any(order[reader] < last for reader in readers)

    left, pending = set[Node](), list(writes)
    while pending:
        memory = pending.pop()
        if memory in left or not is_mixed(memory):
            continue
        left.add(memory)
        ahead = [name for name in names[memory] if name in found]
        while ahead:
            node = ahead.pop()
            if node in found:
                found.discard(node)
                ahead += [user for user in node.users if user in found]
                touched = (memory_of[n] for n in (node, *node.all_input_nodes))
                pending += [other for other in touched if other in writes]
    return found


def _is_constant_call(node: Node, known: Collection[Node], sizes_known: bool = False) -> bool:
    """Whether ``node`` calls a deterministic operator on constants and on calls that are ``known`` to be constant."""
    if node.op != "call_function" or not _is_deterministic(node):
        return False
    if not _is_static(node.meta.get("val"), sizes_known) and node.target is not aten._assert_tensor_metadata.default:
        return False
    given = node.all_input_nodes
    if node.target in _LIKE and given[:1] == [node.args[0]] and _is_static(given[0].meta.get("val"), sizes_known):
        given = given[1:]
    if sizes_known:
        given = [n for n in given if not isinstance(n.meta.get("val"), (int, torch.SymInt))]
    return all(n in known or is_constant(n) for n in given)


def _is_deterministic(node: Node) -> bool:
    """Whether ``node`` computes the same in each call and changes nothing that its schema does not tell."""
    if op(node) in INFERENCE_IDENTITIES:
        return not has_argument(node, "train") or not argument(node, "train") or SWITCHED in node.meta
    if op(node) is BATCH_NORM and argument(node, "running_mean") is not None and is_training(node):
        return False  # it updates the statistics
    random = torch.Tag.nondeterministic_seeded
    target = node.target
    known = isinstance(target, OpOverload) and target.namespace == "aten" and random not in target.tags
    return target is operator.getitem or known


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
def constant_values(
    module: GraphModule, nodes: Collection[Node], writes: Collection[Node] = ()
) -> dict[Node, torch.Tensor]:
    """Return the values of ``nodes``, which follow from constants alone, as tensors of their own, after all ``writes``."""
    values: dict[Node, Any] = {}
    device = device_of(module)
    for node in _cone([*nodes, *writes]):
        values[node] = tensor_of(module, node).detach() if node.op == "get_attr" else _called(node, values, device)
    return {node: values[node].detach().clone() for node in nodes}


def _called(node: Node, values: dict[Node, Any], device: torch.device | None) -> Any:
    def given(argument: Node) -> Any:
        if argument in values:
            return values[argument]
        val = argument.meta["val"]  # its values are not read
        return torch.empty_strided(val.shape, val.stride(), dtype=val.dtype, device=device)

    if op(node) in INFERENCE_IDENTITIES:
        return values[node.all_input_nodes[0]]
    args, kwargs = map_arg((node.args, node.kwargs), given)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def constants_before(nodes: Iterable[Node]) -> list[Node]:
    """Return the constants that ``nodes`` follow from."""
    return [node for node in _cone(nodes) if node.op == "get_attr"]
