"""The float weights of a prepared graph, which post-training algorithms change: every algorithm measures against them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.graph.parameters import set_tensor, tensor_of
from quantflow.graph.state import is_written

# In node.meta of a get_attr node: the tensor that it read before any algorithm changed it.
FLOAT_WEIGHT = "quantflow_float_weight"


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
    before = adopt(graph)
    for node in before.graph.nodes:
        if FLOAT_WEIGHT in node.meta:
            set_tensor(before, str(node.target), float_weight(node, attribute(before, node)).clone(), parameter=True)
    return before


def forget_float_weights(graph: GraphModule) -> dict[Node, torch.Tensor]:
    """Let the weights that ``graph`` has now count as its float weights. Return those remembered so far."""
    return {node: node.meta.pop(FLOAT_WEIGHT) for node in graph.graph.nodes if FLOAT_WEIGHT in node.meta}


def remember_float_weight(read: Node, now: torch.Tensor) -> None:
    """Remember what the ``get_attr`` node reads ``now``, unless an earlier algorithm did."""
    read.meta.setdefault(FLOAT_WEIGHT, now.detach())
