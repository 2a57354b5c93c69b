"""Weights of rewritten operators: reshaped, or all equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument
from quantflow.graph.parameters import is_constant, read_attribute, reads_of, set_tensor, tensor_of, unused_name
from quantflow.graph.rewrites.rewriting import call_before
from quantflow.upstream.operators import OpOverload

EQUAL_WEIGHTS = "quantflow_equal_weights"  # node.meta: a linear layer or convolution that sums its inputs

# Operators that reshape a weight, each with its second argument.
Steps = Sequence[tuple[OpOverload, int | list[int]]]


def has_own_weight(node: Node) -> bool:
    """Whether no other node reads the weight of ``node``."""
    weight = argument(node, "weight")
    return is_constant(weight) and reads_of(node.graph)[str(weight.target)] == 1


def reshaped_weight(module: GraphModule, node: Node, steps: Steps, own: bool) -> Node:
    """Return the weight of ``node`` after ``steps``: under the same name if the weight is its ``own``, else a copy."""
    weight = argument(node, "weight")
    if not is_constant(weight):
        for target, given in steps:
            weight = call_before(node, target, weight, given)
        return weight
    name, old = str(weight.target), tensor_of(module, weight)
    with torch.no_grad():
        flat = old.detach()
        for target, given in steps:
            flat = target(flat, given)
    name = name if own else unused_name(module, f"{name}_reshaped")
    set_tensor(module, name, flat.contiguous(), parameter=isinstance(old, nn.Parameter))
    new = read_attribute(module, name, weight, weight)
    tensor_of(module, new).requires_grad_(old.requires_grad)
    return new
