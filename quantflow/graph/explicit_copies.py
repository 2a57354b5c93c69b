"""Explicit copies and views, because functionalization treats a copy as its source and an undeclared view as a copy."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, has_argument, op, returns_whole, tensor_value, value
from quantflow.graph.rewrites.rewriting import call_before
from quantflow.graph.state import aliased_by, memory_of, written_tensors


def make_memory_explicit(module: GraphModule) -> None:
    """Make the views and then the copies of ``module`` explicit, in place."""
    _drop_hidden_views(module)
    _make_copies_explicit(module)


def _drop_hidden_views(module: GraphModule) -> None:
    """Erase operators such as ``type_as`` that return a written tensor itself without declaring an alias. A write to their
    result would go to a copy otherwise.
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
    """Insert the dtype conversion, expansion and clone that each copy implies, in place.

    torch's decompositions replace a copy by its source. The source may have another dtype or shape than the copy. If the source
    is an input or a buffer that the graph writes later, the copy would change with it.
    """
    written = written_tensors(module.graph)
    for node in list(module.graph.nodes):
        source = node.args[1 if op(node) is aten.copy.default else 0] if node.args else None
        if not isinstance(source, Node) or value(source) is None or not _copies(node):
            continue
        copy = source
        if op(node) is aten.copy.default:
            target, (given, wanted) = node.args[0], (tensor_value(source), tensor_value(node))
            if given.dtype != wanted.dtype:
                copy = call_before(node, aten.to.dtype, copy, wanted.dtype)
            if given.shape != wanted.shape:
                copy = call_before(node, aten.expand_as.default, copy, target)
        if copy is source and source in written and memory_of(source).op in ("placeholder", "get_attr"):
            copy = call_before(node, aten.clone.default, source)
        if copy is not source:
            node.replace_input_with(source, copy)


def _copies(node: Node) -> bool:
    """Whether ``node`` copies a tensor, even if the value is equal."""
    if op(node) in (aten.copy.default, aten._to_copy.default):
        return True
    return op(node) in (aten.to.dtype, aten.to.device) and has_argument(node, "copy") and argument(node, "copy")
