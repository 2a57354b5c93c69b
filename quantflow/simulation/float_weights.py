"""The float weights of a prepared graph, which post-training algorithms change: every algorithm measures against them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.graph.parameters import set_tensor, tensor_of
from quantflow.graph.state import is_written

# In node.meta of a get_attr node: the tensor that it read before any algorithm changed it.
FLOAT_WEIGHT = "quantflow_float_weight"
# Likewise: the tensor of the float network that teaches, which training does not change.
TEACHER_WEIGHT = "quantflow_teacher_weight"


def attribute(graph: GraphModule, read: Node) -> Any:
    """What the ``get_attr`` node reads now: a tensor, without its gradient, or a submodule. State comes as a copy, so that a
    simulation does not change it.
    """
    found = tensor_of(graph, read)
    return given_input(read, found.detach()) if isinstance(found, torch.Tensor) else found


def given_input(read: Node, x: Any) -> Any:
    """``x``, which the node ``read`` stands for: a copy where the graph writes it."""
    return x.clone() if isinstance(x, torch.Tensor) and is_written(read) else x


def float_weight(read: Node, now: Any) -> Any:
    """What the ``get_attr`` node read before any algorithm, given what it reads ``now``."""
    return read.meta[FLOAT_WEIGHT].to(now.device) if FLOAT_WEIGHT in read.meta else now


def with_float_weights(graph: GraphModule) -> TrainableGraphModule:
    """A copy of ``graph`` with every weight and bias as it was before any algorithm changed it."""
    return _with(graph, FLOAT_WEIGHT)


def with_teacher_weights(graph: GraphModule) -> TrainableGraphModule:
    """A copy of ``graph`` with the weights that :func:`remember_teacher` remembered."""
    return _with(graph, TEACHER_WEIGHT)


def _with(graph: GraphModule, remembered: str) -> TrainableGraphModule:
    before = adopt(graph)
    for node in before.graph.nodes:
        if remembered in node.meta:
            weight = node.meta[remembered].to(attribute(before, node).device)
            set_tensor(before, str(node.target), weight.clone(), parameter=True)
    return before


def remember_teacher(graph: GraphModule) -> None:
    """Remember the float network of ``graph`` as the teacher of its training, unless one is remembered."""
    for node in graph.graph.nodes:
        now = tensor_of(graph, node) if node.op == "get_attr" else None
        if isinstance(now, nn.Parameter) and TEACHER_WEIGHT not in node.meta:
            # A remembered tensor is nobody's to write; training writes the parameter.
            node.meta[TEACHER_WEIGHT] = node.meta[FLOAT_WEIGHT] if FLOAT_WEIGHT in node.meta else now.detach().clone()


def remember_teacher_weight(read: Node, now: torch.Tensor) -> None:
    """Remember ``now``, which nobody writes, as what the ``get_attr`` node reads in the teacher, unless one is remembered."""
    read.meta.setdefault(TEACHER_WEIGHT, now.detach())


def has_teacher(graph: GraphModule) -> bool:
    """Whether the float network that ``graph`` was made from is remembered as its teacher."""
    return any(TEACHER_WEIGHT in node.meta for node in graph.graph.nodes)


def forget_float_weights(graph: GraphModule) -> dict[Node, torch.Tensor]:
    """Let the weights that ``graph`` has now count as its float weights. Return those remembered so far."""
    return {node: node.meta.pop(FLOAT_WEIGHT) for node in graph.graph.nodes if FLOAT_WEIGHT in node.meta}


def remember_float_weight(read: Node, now: torch.Tensor) -> None:
    """Remember what the ``get_attr`` node reads ``now``, unless an earlier algorithm did."""
    read.meta.setdefault(FLOAT_WEIGHT, now.detach())
