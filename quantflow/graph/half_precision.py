"""Half precision written as float32: integers stand beside float32 only, and some backends have no kernels for a half dtype."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import map_aggregate

from quantflow.graph.aten import aten, op, value
from quantflow.graph.parameters import set_tensor, tensor_of
from quantflow.graph.state import is_written
from quantflow.upstream import pytree
from quantflow.upstream.fake_tensors import enable_python_dispatcher
from quantflow.upstream.operators import HigherOrderOperator

HALF = frozenset({torch.float16, torch.bfloat16})
_LOOKUPS = frozenset({aten.embedding.default})  # these read a few rows, whose table may stay as small as it is
_CONVERSIONS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default})


def computed_in(module: GraphModule, dtypes: Collection[torch.dtype] = HALF) -> set[torch.dtype]:
    """Return those of ``dtypes`` in which ``module`` computes, other than by lookups and conversions."""
    return {t.dtype for node in module.graph.nodes if _computes(node) for t in _tensors(node)} & set(dtypes)


def compute_in_float32(module: GraphModule, dtypes: Collection[torch.dtype] = HALF) -> set[torch.dtype]:
    """Let ``module`` compute in float32 what it computes in ``dtypes``, in place. The caller recompiles.

    Inputs and outputs keep their dtype, and so do tables of embeddings. Weights and state become float32. A graph stays as it
    is if neither an input nor a weight is in half precision, if it writes such an input (an exported program has its state as
    inputs), or if it has a region, whose body may choose a dtype.

    Returns:
        The dtypes in which it computed.
    """
    graph, half = module.graph, set(dtypes)
    computed = computed_in(module, half)
    read = [n for n in graph.nodes if n.op in ("placeholder", "get_attr") and any(t.dtype in half for t in _tensors(n))]
    fixed = any(n.op == "placeholder" and is_written(n) for n in read)
    if not computed or not read or fixed or any(isinstance(n.target, HigherOrderOperator) for n in graph.nodes):
        return set()
    output, kept, given = graph.output_node(), set[Node](), list[Node]()
    for node in output.all_input_nodes:
        for dtype in {t.dtype for t in _tensors(node)} & half:
            kept.add(returned := _converted(node, dtype, output))
            output.replace_input_with(node, returned)
    for node in read:
        looked_up = [user for user in node.users if op(user) in _LOOKUPS and user.args[0] is node]
        if node.op == "placeholder":
            given.append(node)
        elif len(looked_up) == len(node.users):
            given += looked_up
            kept.add(node)
        else:
            tensor = tensor_of(module, node)
            set_tensor(module, str(node.target), tensor.detach().float(), parameter=isinstance(tensor, nn.Parameter))
    kept.update(given)
    for node in graph.nodes:
        if node not in kept and node is not output:
            _in_float32(node, half)
    for node in dict.fromkeys(given):
        behind = _converted(node, torch.float32, node.next)
        for user in [user for user in node.users if user is not behind]:
            user.replace_input_with(node, behind)
    return computed


def named(dtypes: Collection[torch.dtype]) -> str:
    """The names of ``dtypes`` for a message."""
    return " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))


def _computes(node: Node) -> bool:
    return node.op == "call_function" and op(node) not in _LOOKUPS | _CONVERSIONS


def _in_float32(node: Node, half: set[torch.dtype]) -> None:
    def wide(given: Any) -> Any:
        return torch.float32 if given in half else given

    node.args, node.kwargs = (cast(Any, map_aggregate(given, wide)) for given in (node.args, node.kwargs))
    if "val" in node.meta:
        with enable_python_dispatcher():
            node.meta["val"] = pytree.tree_map_only(
                torch.Tensor, lambda t: t.to(torch.float32) if t.dtype in half else t, node.meta["val"]
            )


def _converted(node: Node, dtype: torch.dtype, before: Node) -> Node:
    with node.graph.inserting_before(before):
        new = node.graph.call_function(aten.to.dtype, (node, dtype))
    new.meta = {key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta}
    if (val := value(node)) is not None:
        with enable_python_dispatcher():
            new.meta["val"] = val.to(dtype)
    return new


def _tensors(node: Node) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)]
