"""Copies and views made explicit: functional graphs take a copied tensor for its source, and a hidden view for a copy."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, has_argument, op, returns_whole, value
from quantflow.graph.rewrites.rewriting import call_before
from quantflow.graph.state import aliased_by, memory_of, written_tensors


def make_memory_explicit(module: GraphModule) -> None:
    """Both, in place: first what is no copy, then what is one."""
    _drop_hidden_views(module)
    _make_copies_explicit(module)


def _drop_hidden_views(module: GraphModule) -> None:
    """Let a tensor that is written go by its own name where an operator returns it whole, and no schema says so (``type_as``):
    what is written by the other name would be written to a copy.
    """
    written = written_tensors(module.graph)
    for node in reversed(module.graph.nodes):
        base = aliased_by(node)
        if base is None or node not in written or not returns_whole(node):
            continue
        mine, whole = value(node), value(base)
        if mine is not None and whole is not None and (mine.shape, mine.dtype) == (whole.shape, whole.dtype):
            node.replace_all_uses_with(base)
            module.graph.erase_node(node)


def _make_copies_explicit(module: GraphModule) -> None:
    """Convert, expand and clone, in place, what a copy converts, expands and keeps from being written.

    torch's decompositions put the source itself in the place of a copy. It may have another dtype or shape than what it was
    copied into, and where it lies in an input or in a buffer that the graph writes later, the copy changes with it.
    """
    written = written_tensors(module.graph)
    for node in list(module.graph.nodes):
        source = node.args[1 if op(node) is aten.copy.default else 0] if node.args else None
        if not isinstance(source, Node) or value(source) is None or not _copies(node):
            continue
        copy = source
        if op(node) is aten.copy.default:
            target, (given, wanted) = node.args[0], (value(source), value(node))
            if given.dtype != wanted.dtype:  # type: ignore[union-attr]
                copy = call_before(node, aten.to.dtype, copy, wanted.dtype)  # type: ignore[union-attr]
            if given.shape != wanted.shape:  # type: ignore[union-attr]
                copy = call_before(node, aten.expand_as.default, copy, target)
        if copy is source and source in written and memory_of(source).op in ("placeholder", "get_attr"):
            copy = call_before(node, aten.clone.default, source)
        if copy is not source:
            node.replace_input_with(source, copy)


def _copies(node: Node) -> bool:
    """Whether ``node`` copies a tensor, though its value may equal it."""
    if op(node) in (aten.copy.default, aten._to_copy.default):
        return True
    return op(node) in (aten.to.dtype, aten.to.device) and has_argument(node, "copy") and argument(node, "copy")
