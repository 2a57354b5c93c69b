"""Applying exact rewrites to a graph, and what they write with: calls, constants and shapes that hold for any batch."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quantflow.aten import op, value
from quantflow.graph.parameters import read_attribute, unused_name
from quantflow.graph.state import aliased_by, drop_dead_code, written_tensors

# Takes a node and returns the one that replaces it, or None where the rewrite does not apply.
Rewrite = Callable[[GraphModule, Node], Node | None]


def rewrite(module: GraphModule, rewrites: Mapping[Any, Rewrite]) -> GraphModule:
    """Apply ``rewrites``, by operator, to every node of ``module``, in place."""
    changed, written, there = False, written_tensors(module.graph), set(module.graph.nodes)
    for node in list(module.graph.nodes):
        apply = rewrites.get(op(node))
        # What is made anew may stand for what is written later; a name of memory that others write may not become a copy.
        kept = node in written and aliased_by(node) is not None
        replacement = apply(module, node) if apply is not None and not kept else None
        if replacement is None or (node in written and replacement in there):
            continue
        changed = True
        if replacement is not node:
            node.replace_all_uses_with(replacement)
            module.graph.erase_node(node)
    if changed:
        drop_dead_code(module.graph)
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
        with mode, enable_python_dispatcher():  # without it, a size that varies becomes the example's
            new.meta["val"] = target(*values)
    return new


def call_part(node: Node, several: Node, index: int) -> Node:
    """The result ``index`` of ``several``, a call with more than one, before ``node``."""
    with node.graph.inserting_before(node):
        part = node.graph.call_function(operator.getitem, (several, index))
    part.meta = {key: given for key, given in several.meta.items() if key != "val"}
    if "val" in several.meta:
        part.meta["val"] = several.meta["val"][index]
    return part


def reads_part(node: Node, index: int) -> bool:
    """Whether anything reads the result ``index`` of ``node``, a call with more than one."""
    return any(user.users and user.args[1] == index for user in node.users)


def replace_parts(node: Node, *parts: Node) -> Node:
    """Let ``parts`` stand for the results of ``node``, a call with more than one; gives ``node``, which nothing then reads."""
    for user in list(node.users):
        if user.users:
            user.replace_all_uses_with(parts[user.args[1]])  # type: ignore[index]
        node.graph.erase_node(user)
    return node


def tensor_before(module: GraphModule, node: Node, tensor: torch.Tensor) -> Node:
    """A read of ``tensor`` before ``node``: a buffer that no checkpoint holds."""
    name = unused_name(module, f"{node.name}_constant")
    device = next((t.device for t in (*module.parameters(), *module.buffers())), None)
    module.register_buffer(name, tensor.to(device), persistent=False)
    like = next((n for n in (node, *node.all_input_nodes) if value(n) is not None), node)
    return read_attribute(module, name, node, like)


def constant_before(module: GraphModule, node: Node, number: float, shape: tuple[int, ...] = (1,)) -> Node:
    """A read of a tensor full of ``number``, in the dtype of ``node``, before it."""
    return tensor_before(module, node, torch.full(shape, number, dtype=value(node).dtype))  # type: ignore[union-attr]


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
