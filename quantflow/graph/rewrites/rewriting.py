"""Application of exact rewrites to a graph, and helpers that insert calls and constants valid for any batch size."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import Argument, map_arg

from quantflow.errors import QuantflowWarning
from quantflow.graph.aten import label, op, value
from quantflow.graph.dead_code import drop_dead_code
from quantflow.graph.parameters import device_of, read_attribute, tensor_of, unused_name
from quantflow.graph.rewrites.batches import batch_dimension
from quantflow.graph.state import aliased_by, is_written, memory_of, seen_as_one, written_tensors
from quantflow.upstream.fake_tensors import enable_python_dispatcher
from quantflow.upstream.modules import own_buffers, own_parameters
from quantflow.upstream.operators import OpOverload

# The replacement of a node: a node or, for a call with several results, the results that are read, by index; None if the
# rewrite does not apply.
Results: TypeAlias = Sequence[Node] | Mapping[int, Node]
Replacement: TypeAlias = Node | Results | None
# A function that inserts the replacement of a node before the node.
Rewrite = Callable[[GraphModule, Node], Replacement]


_aten = torch.ops.aten
# The gradient of these operators is computed from their result, so no node may write into the result.
_SAVED_BY_AUTOGRAD = frozenset(
    {
        *(_aten.relu.default, _aten.sigmoid.default, _aten.tanh.default, _aten.exp.default, _aten.softmax.int),
        *(_aten.sqrt.default, _aten.rsqrt.default, _aten.reciprocal.default, _aten.log_softmax.int),
    }
)


_PERMUTES = frozenset({_aten.permute.default, _aten.transpose.int})


def rewrite(module: GraphModule, rewrites: Mapping[OpOverload, Rewrite]) -> GraphModule:
    """Apply ``rewrites``, a table by operator, to every node of ``module``, in place.

    A view of memory that the graph writes is not rewritten, because a replacement could be a copy. A new tensor is not replaced
    by a view of other memory if the difference is visible; it is cloned. A node whose rewrite fails stays, with a warning.
    """
    changed, written, there = False, written_tensors(module.graph), set(module.graph.nodes)
    for node in list(module.graph.nodes):
        apply = rewrites.get(op(node))
        if apply is None or (node in written and aliased_by(node) is not None):
            continue
        before = node.prev
        replacement = _attempt(module, node, apply, there)
        there.update(inserted := inserted_between(before, node))
        if replacement is None:
            continue
        changed = True
        _replace(node, replacement, inserted)
    if changed:
        drop_dead_code(module.graph, trains=True)
        module.graph.lint()
        module.recompile()
    return module


def _attempt(module: GraphModule, node: Node, apply: Rewrite, there: set[Node]) -> Replacement:
    """The result of ``apply``. If ``apply`` fails, restore the graph, warn and return None."""
    weights = {str(n.target): tensor_of(module, n) for n in node.all_input_nodes if n.op == "get_attr"}
    try:
        return apply(module, node)
    except Exception as error:
        _undo(module, there, weights)
        reason = f"{op(node)} could not be rewritten for the backend and stays: {type(error).__name__}: {error}"
        remedy = "report it; if the backend lacks the operator, write the layer in terms of other operators"
        warnings.warn(QuantflowWarning("rewrite", reason, node=label(node), remedy=remedy), stacklevel=3)
        return None


def _undo(module: GraphModule, there: set[Node], weights: Mapping[str, torch.Tensor]) -> None:
    """Erase all nodes except ``there``, erase the state that only they read, and restore ``weights``."""
    added = set()
    for new in reversed(module.graph.nodes):
        if new not in there and not new.users:
            if new.op == "get_attr":
                added.add(str(new.target))
            module.graph.erase_node(new)
    for name in added - {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}:
        owner, _, leaf = name.rpartition(".")
        delattr(module.get_submodule(owner), leaf)
    for name, tensor in weights.items():
        owner, _, leaf = name.rpartition(".")
        held = module.get_submodule(owner)
        state: dict = own_parameters(held) if isinstance(tensor, torch.nn.Parameter) else own_buffers(held)
        state[leaf] = tensor


def inserted_between(before: Node, node: Node) -> set[Node]:
    """Return the nodes between ``before`` and ``node``."""
    found = set()
    while (before := before.next) is not node:
        found.add(before)
    return found


def _replace(node: Node, replacement: Node | Results, inserted: set[Node]) -> None:
    """Replace ``node`` by ``replacement``, which the ``inserted`` nodes or older nodes compute."""
    results = [node] if isinstance(replacement, Node) else list(node.users)
    for old in results:
        if old.users:
            new = replacement if isinstance(replacement, Node) else replacement[cast(int, old.args[1])]
            shares = memory_of(new) not in inserted and aliased_by(node) is None
            if (shares and seen_as_one(old, new)) or (op(new) in _SAVED_BY_AUTOGRAD and is_written(old)):
                new = call_before(node, _aten.clone.default, new)
            if _viewed_in_other_order(old, new):
                new = call_before(node, _aten.contiguous.default, new)
            old.replace_all_uses_with(new)
        if old is not node:
            node.graph.erase_node(old)
    node.graph.erase_node(node)


def _viewed_in_other_order(old: Node, new: Node) -> bool:
    """Whether a ``view`` reads ``old``, itself or permuted, that may fail on ``new``, which may have other strides."""
    given, wanted = value(new), value(old)
    if given is not None and wanted is not None and given.stride() == wanted.stride():
        return False
    ahead = [old]
    while ahead:
        users = list(ahead.pop().users)
        if any(user.target is _aten.view.default for user in users):
            return True
        ahead += [user for user in users if user.target in _PERMUTES]
    return False


def call_before(node: Node, target: Callable, *args: Argument) -> Node:
    """Insert a call of ``target`` before ``node``, in the same layer."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta = {k: node.meta[k] for k in ("nn_module_stack", "stack_trace") if k in node.meta}
    values = map_arg(args, lambda n: n.meta["val"])
    mode = getattr(value(node), "fake_mode", None) or next(
        (n.meta["val"].fake_mode for n in node.all_input_nodes if hasattr(n.meta.get("val"), "fake_mode")), None
    )
    if mode is not None:
        with mode, enable_python_dispatcher():  # without it, a dynamic size becomes the size of the example
            new.meta["val"] = target(*values)
    return new


def call_part(node: Node, several: Node, index: int) -> Node:
    """Insert a read of result ``index`` of ``several``, a call with several results, before ``node``."""
    with node.graph.inserting_before(node):
        part = node.graph.call_function(operator.getitem, (several, index))
    part.meta = {key: given for key, given in several.meta.items() if key != "val"}
    if "val" in several.meta:
        part.meta["val"] = several.meta["val"][index]
    return part


def reads_part(node: Node, index: int) -> bool:
    """Whether a node reads result ``index`` of ``node``, a call with several results."""
    return any(user.users and user.args[1] == index for user in node.users)


def tensor_before(module: GraphModule, node: Node, tensor: torch.Tensor) -> Node:
    """Add ``tensor`` as a non-persistent buffer and insert a read of it before ``node``."""
    name = unused_name(module, f"{node.name}_constant")
    device = device_of(module)
    module.register_buffer(name, tensor.to(device), persistent=False)
    like = next((n for n in (node, *node.all_input_nodes) if value(n) is not None), node)
    return read_attribute(module, name, node, like)


def constant_before(module: GraphModule, node: Node, number: float, shape: tuple[int, ...] | None = None) -> Node:
    """Insert a read of a tensor filled with ``number``, in the dtype of ``node``, before ``node``. By default the tensor has
    one element, and no dimension if ``node`` has none.
    """
    val = value(node)
    assert val is not None
    shape = (1,) * min(val.ndim, 1) if shape is None else shape
    return tensor_before(module, node, torch.full(shape, number, dtype=val.dtype))


def reads_input(node: Node) -> bool:
    """Whether the value of ``node`` depends on an input of the graph and so may have a batch dimension."""
    seen, ahead = {node}, [node]
    while ahead:
        given = ahead.pop()
        if given.op == "placeholder":
            return True
        ahead.extend(further := [n for n in given.all_input_nodes if n not in seen])
        seen.update(further)
    return False


def open_shape(node: Node) -> list[int] | None:
    """Return the shape of the value of ``node`` with -1 for the dynamic dimension, or for the batch dimension of a static
    shape, because the batch size may differ from the example; None if several dimensions are dynamic.
    """
    val = value(node)
    if val is None:
        return None
    static = all(isinstance(size, int) for size in val.shape)
    return open_sizes(val.shape, batch_dimension(node) if static else None)


def open_sizes(shape: Sequence[int | torch.SymInt], batch: int | None = 0) -> list[int] | None:
    """Return ``shape`` in the form of :func:`open_shape`, given its ``batch`` dimension, or None for no batch."""
    sizes = [s if isinstance(s, int) else -1 for s in shape]
    if batch is not None and batch < len(sizes) and -1 not in sizes and 0 not in sizes:
        sizes[batch] = -1
    return sizes if sizes.count(-1) <= 1 and not (-1 in sizes and 0 in sizes) else None
