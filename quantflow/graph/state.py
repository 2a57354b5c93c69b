"""Analysis of in-place writes in a graph: to state, to inputs, and to tensors whose memory other nodes read."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch.fx import Graph, GraphModule, Node

from quantflow.graph.aten import INFERENCE_IDENTITIES, is_view, op, viewed_of_list
from quantflow.upstream import pytree
from quantflow.upstream.operators import HigherOrderOperator, OpOverload, schema_of

T = TypeVar("T")


def all_written_by(node: Node) -> list[Node]:
    """Return the tensors that ``node`` writes in place, itself or in the body of a region that it calls."""
    if isinstance(node.target, HigherOrderOperator):
        return _written_by_region(node)
    if not isinstance(node.target, OpOverload):
        return []
    found: list[Node] = []
    for position, declared in enumerate(schema_of(node.target).arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(declared.name)
            found.extend(leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Node))
    return found


def _written_by_region(node: Node) -> list[Node]:
    """The inputs of a region that one of its bodies writes. In the arguments, the inputs follow the bodies."""
    owner, bodies, given = node.graph.owning_module, list[GraphModule](), list[object]()
    for argument in pytree.tree_leaves(node.args):
        body = None
        if isinstance(argument, Node) and argument.op == "get_attr" and owner is not None:
            body = dict(owner.named_modules()).get(str(argument.target))
        if isinstance(body, GraphModule):
            bodies.append(body)
            given = []
        else:
            given.append(argument)
    taken = [list(zip(body.graph.find_nodes(op="placeholder"), given, strict=False)) for body in bodies]
    return [arg for pairs in taken for inner, arg in pairs if isinstance(arg, Node) and is_written(inner)]


def written_by(node: Node) -> Node | None:
    """Return the tensor that the operator ``node`` writes in place and returns; None if there is none."""
    if not isinstance(node.target, OpOverload):
        return None
    return next(iter(all_written_by(node)), None)


def aliased_by(node: Node) -> Node | None:
    """Return the node whose memory the value of ``node`` may share: the source of a view, or the tensor that it writes."""
    if (viewed := viewed_of_list(node)) is not None:
        return viewed
    if node.target is operator.getitem or is_view(node) or op(node) in INFERENCE_IDENTITIES:
        base = node.args[0]
        return base if isinstance(base, Node) else None
    return written_by(node)


def memory_of(node: Node) -> Node:
    """Return the node that allocated the memory that the value of ``node`` may share."""
    while (base := aliased_by(node)) is not None:
        node = base
    return node


def _names(memory: Node) -> Iterator[Node]:
    """The nodes whose values may share the memory of ``memory`` directly, not through another node."""
    for user in memory.users:
        yield from (node for node in (user, *user.users) if aliased_by(node) is memory)


def is_written(read: Node) -> bool:
    """Whether a node writes into the memory of ``read``, a ``get_attr`` or an input, directly or through a view. A written
    parameter or buffer is state. The caller sees a written input change.
    """
    return any(read in all_written_by(user) for user in read.users) or any(map(is_written, _names(read)))


def state_reads(graph: Graph) -> list[Node]:
    """Return the ``get_attr`` nodes of the state that ``graph`` writes, in the order of its names."""
    return sorted((n for n in graph.find_nodes(op="get_attr") if is_written(n)), key=lambda read: str(read.target))


def writes_for_others(node: Node) -> bool:
    """Whether another node, the caller or the next call may see an in-place write of ``node``."""
    return any(map(_is_seen, all_written_by(node)))


def _is_seen(written: Node) -> bool:
    base: Node | None = written
    while base is not None and base.op == "call_function":
        if len(base.users) > 1:
            return True
        base = aliased_by(base)
    return base is not None


def written_tensors(graph: Graph, *, caller: bool = True) -> frozenset[Node]:
    """Return the nodes whose values may share memory with a visible in-place write: to state, to an input (if ``caller`` is
    true), or to a tensor that a node reads after the write through an older view. A copy made before the write would not
    change.
    """
    lasting = {"get_attr", "placeholder"} if caller else {"get_attr"}
    order, root, named = memories(graph)
    seen = set[Node]()
    for node in graph.nodes:
        for memory in {root[base] for base in all_written_by(node)} - seen:
            older = (user for name in named[memory] if order[name] < order[node] for user in name.users)
            if memory.op in lasting or any(order[user] > order[node] for user in older):
                seen.add(memory)
    return frozenset(name for memory in seen for name in named[memory])


def overwritten(graph: Graph) -> frozenset[Node]:
    """Return the nodes whose values may be overwritten by the end of an execution of ``graph``."""
    _, root, _ = memories(graph)
    memory = {root[base] for node in graph.nodes if writes_for_others(node) for base in all_written_by(node)}
    return frozenset(node for node, first in root.items() if first in memory)


def seen_as_one(node: Node, other: Node) -> bool:
    """Whether it would be visible if the new value of ``node`` shared the memory of ``other``: one is written and the other is
    read later or is state, or the caller gets both.
    """
    order, root, named = memories(node.graph)
    names = named[root[node]], named[root[other]]
    lasts = root[other].op in ("get_attr", "placeholder")
    returned = [any(user.op == "output" for name in group for user in name.users) for group in names]
    if returned[0] and (lasts or returned[1]):
        return True
    for written, read, kept in ((*names, lasts), (*names[::-1], False)):
        users = {user for name in written for user in name.users if order[user] > order[node]}
        writes = [order[user] for user in users if any(base in written for base in all_written_by(user))]
        if writes and (kept or any(order[user] >= min(writes) for name in read for user in name.users)):
            return True
    return False


def memories(graph: Graph) -> tuple[dict[Node, int], dict[Node, Node], dict[Node, list[Node]]]:
    """The position of each node, the node that allocated the memory of its value, and all nodes that share that memory."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    root: dict[Node, Node] = {}
    named: defaultdict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        base = aliased_by(node)
        root[node] = node if base is None else root[base]
        named[root[node]].append(node)
    return order, root, named


def inputs_kept(module: GraphModule, inputs: T) -> T:
    """Return ``inputs``, in any structure, for one call of ``module``: with cloned tensors if its graph writes an input."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, inputs) if writes_inputs(module) else inputs


def writes_inputs(module: GraphModule) -> bool:
    """Whether the graph of ``module`` writes one of its inputs in place."""
    return any(is_written(node) for node in module.graph.find_nodes(op="placeholder"))
