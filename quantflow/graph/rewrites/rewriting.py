"""Applying exact rewrites to a graph, and what they write with: calls, constants and shapes that hold for any batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quantflow.aten import op, value
from quantflow.graph.parameters import read_attribute, unused_name
from quantflow.graph.state import written_tensors

# Takes a node and returns the one that replaces it, or None where the rewrite does not apply.
Rewrite = Callable[[GraphModule, Node], Node | None]


def rewrite(module: GraphModule, rewrites: Mapping[Any, Rewrite]) -> GraphModule:
    """Apply ``rewrites``, by operator, to every node of ``module``, in place."""
    changed, written = False, written_tensors(module.graph)
    for node in list(module.graph.nodes):
        apply = rewrites.get(op(node))
        replacement = apply(module, node) if apply is not None and node not in written else None
        if replacement is None:
            continue
        changed = True
        if replacement is not node:
            node.replace_all_uses_with(replacement)
            module.graph.erase_node(node)
    if changed:
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
    return module


def call_before(node: Node, target: Any, *args: Any) -> Node:
    """A call of ``target`` before ``node``, of the same layer."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta = {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}
    values = map_arg(args, lambda n: n.meta["val"])
    mode = getattr(value(node), "fake_mode", None) or next(
        (n.meta["val"].fake_mode for n in node.all_input_nodes if hasattr(n.meta.get("val"), "fake_mode")), None
    )
    if mode is not None:
        with mode:
            new.meta["val"] = target(*values)
    return new


def constant_before(module: GraphModule, node: Node, number: float, shape: tuple[int, ...] = (1,)) -> Node:
    """A read of a tensor full of ``number``, in the dtype of ``node``, before it: a buffer that no checkpoint holds."""
    name = unused_name(module, f"{node.name}_constant")
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    dtype = value(node).dtype  # type: ignore[union-attr]
    module.register_buffer(name, torch.full(shape, number, dtype=dtype, device=device), persistent=False)
    return read_attribute(module, name, node, node)


def open_shape(node: Node) -> list[int] | None:
    """The shape of the value of ``node`` with -1 for the dimension that varies, or for the first (a graph is called with other
    batches than its example's); None where more than one varies.
    """
    val = value(node)
    return None if val is None else open_sizes(val.shape)


def open_sizes(shape: Sequence[int | torch.SymInt]) -> list[int] | None:
    """``shape`` as :func:`open_shape` has it."""
    sizes = [s if isinstance(s, int) else -1 for s in shape]
    if -1 not in sizes and 0 not in sizes:
        sizes[:1] = [-1] * len(sizes[:1])
    return sizes if sizes.count(-1) <= 1 else None
