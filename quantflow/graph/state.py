"""What a graph writes in place: state that lasts from call to call, inputs, and tensors of which others see what is written."""

from __future__ import annotations

import contextlib
import operator
from collections import defaultdict
from collections.abc import Iterator
from typing import TypeVar

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.fx import Graph, GraphModule, Node

from quantflow.aten import INFERENCE_IDENTITIES, is_view, op

T = TypeVar("T")


def written_by(node: Node) -> Node | None:
    """The tensor into which ``node`` writes in place, None where it writes into none."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    for position, declared in enumerate(node.target._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            given = node.args[position] if position < len(node.args) else node.kwargs.get(declared.name)
            if isinstance(given, Node):
                return given
    return None


def aliased_by(node: Node) -> Node | None:
    """The node in whose memory the value of ``node`` lies or may lie: that of a view, or of what it writes into."""
    if node.target is operator.getitem or is_view(node) or op(node) in INFERENCE_IDENTITIES:
        base = node.args[0]
        return base if isinstance(base, Node) else None
    return written_by(node)


def memory_of(node: Node) -> Node:
    """The node that made the memory in which the value of ``node`` lies or may lie."""
    while (base := aliased_by(node)) is not None:
        node = base
    return node


def is_written(read: Node) -> bool:
    """Whether a node writes into the memory of ``read`` or of what is made of it without a copy. For what reads a parameter or
    a buffer, and for inputs: those of which it holds are state, and inputs that the caller sees changed.
    """
    return any(written_by(user) is read or (aliased_by(user) is read and is_written(user)) for user in read.users)


def writes_for_others(node: Node) -> bool:
    """Whether another node, the caller or the next call may see what ``node`` writes in place."""
    base = written_by(node)
    while base is not None and base.op == "call_function":
        if len(base.users) > 1:
            return True
        base = aliased_by(base)
    return base is not None


def written_tensors(graph: Graph, *, caller: bool = True) -> frozenset[Node]:
    """The nodes whose values lie in memory that is written where that can be seen: in state, in an input (where the ``caller``
    counts), or in a tensor that a node reads, after the write, by an older name. A copy that is made of these before the write
    would not see it.
    """
    lasting = {"get_attr", "placeholder"} if caller else {"get_attr"}
    order, root, named = _memories(graph)
    seen = set()
    for node in graph.nodes:
        base = written_by(node)
        if base is None or root[base] in seen:
            continue
        older = (user for name in named[root[base]] if order[name] < order[node] for user in name.users)
        if root[base].op in lasting or any(order[user] > order[node] for user in older):
            seen.add(root[base])
    return frozenset(name for memory in seen for name in named[memory])


def overwritten(graph: Graph) -> frozenset[Node]:
    """The nodes whose values a walk over ``graph`` writes over, or may have written over by its end."""
    _, root, _ = _memories(graph)
    memory = {root[base] for node in graph.nodes if writes_for_others(node) and (base := written_by(node)) is not None}
    return frozenset(node for node, first in root.items() if first in memory)


def seen_as_one(node: Node, other: Node) -> bool:
    """Whether anyone could see that the value of ``node``, which is made anew, lay in the memory of ``other``: one of them is
    written while the other is read later or lasts, or the caller holds both.
    """
    order, root, named = _memories(node.graph)
    names = named[root[node]], named[root[other]]
    lasts = root[other].op in ("get_attr", "placeholder")
    returned = [any(user.op == "output" for name in group for user in name.users) for group in names]
    if returned[0] and (lasts or returned[1]):
        return True
    for written, read, kept in ((*names, lasts), (*names[::-1], False)):
        writes = [order[name] for name in written if written_by(name) is not None and order[name] > order[node]]
        if writes and (kept or any(order[user] >= min(writes) for name in read for user in name.users)):
            return True
    return False


def _memories(graph: Graph) -> tuple[dict[Node, int], dict[Node, Node], dict[Node, list[Node]]]:
    """The place of each node, the one that made the memory of its value, and all names of that memory."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    root: dict[Node, Node] = {}
    named: defaultdict[Node, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        base = aliased_by(node)
        root[node] = node if base is None else root[base]
        named[root[node]].append(node)
    return order, root, named


def written_buffers(module: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """The buffers that the graph of ``module`` writes, or all where it has no graph, each with its owner and its name there."""
    read = (
        {str(n.target) for n in module.graph.nodes if n.op == "get_attr" and is_written(n)}
        if _has_graph(module)
        else None
    )
    return [
        (owner, name, buffer)
        for path, owner in module.named_modules()
        for name, buffer in owner._buffers.items()
        if buffer is not None and (read is None or (f"{path}.{name}" if path else name) in read)
    ]


@contextlib.contextmanager
def state_kept(module: nn.Module) -> Iterator[None]:
    """Run ``module`` for a while, and give its state back as it was."""
    kept = OwnState(module)
    try:
        yield
    finally:
        kept.put_back()


class OwnState:
    """The state of ``module`` at this moment, apart from it: it stays where other calls of what shares its memory write it."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._buffers = module, written_buffers(module)
        self._values = [buffer.detach().clone() for _, _, buffer in self._buffers]

    def put_back(self) -> None:
        """Bring the module into this state."""
        for (owner, name, buffer), value in zip(self._buffers, self._values, strict=True):
            grown = value.shape != buffer.shape  # the module gave itself another tensor
            if not grown:
                with torch.no_grad():
                    buffer.detach().copy_(value)
            owner._buffers[name] = value.clone() if grown else buffer

    @contextlib.contextmanager
    def present(self) -> Iterator[None]:
        """Run the module for a while from this state, which goes on."""
        outside = OwnState(self._module)
        self.put_back()
        try:
            yield
        finally:
            now = [owner._buffers[name] for owner, name, _ in self._buffers]
            self._values = [v if n is None else n.detach().clone() for n, v in zip(now, self._values, strict=True)]
            outside.put_back()

    def shares(self, other: OwnState) -> bool:
        """Whether a buffer of the one lies in the memory of a buffer of the other."""
        ours, theirs = (
            {b.untyped_storage().data_ptr() for *_, b in state._buffers if b.numel()} for state in (self, other)
        )
        return bool(ours & theirs)


def inputs_kept(module: GraphModule, inputs: T) -> T:
    """``inputs``, in any structure, for one call of ``module``: copies of their tensors where its graph writes an input."""
    return pytree.tree_map_only(torch.Tensor, torch.clone, inputs) if writes_inputs(module) else inputs


def writes_inputs(module: GraphModule) -> bool:
    """Whether the graph of ``module`` writes to one of its inputs."""
    return any(is_written(node) for node in module.graph.find_nodes(op="placeholder"))


def _has_graph(module: nn.Module) -> bool:
    return isinstance(module, GraphModule)
