"""Rewrites of scalar operands of arithmetic into constant tensors."""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, has_argument, is_float_tensor, op, tensor_value
from quantflow.graph.rewrites.poles import feeds_a_pole
from quantflow.graph.rewrites.rewriting import Rewrite, call_before, constant_before
from quantflow.upstream.operators import OpOverload

_TENSOR_FORM = {aten.add.Scalar: aten.add.Tensor, aten.sub.Scalar: aten.sub.Tensor, aten.mul.Scalar: aten.mul.Tensor}
_SUMS = {aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar}


def scalar_operand(module: GraphModule, node: Node) -> Node | None:
    """Write a scalar operand as a constant tensor."""
    numbers = [a for a in node.args[:2] if isinstance(a, (int, float)) and not isinstance(a, bool)]
    if len(numbers) != 1 or not is_float_tensor(node) or node.kwargs or tensor_value(node).ndim == 0:
        return None
    if has_argument(node, "alpha") and argument(node, "alpha") != 1:
        return None
    number, target, swap = float(numbers[0]), op(node), False
    if target in _SUMS and feeds_a_pole(node):
        return None
    if target in (aten.div.Tensor, aten.div.Scalar):
        if isinstance(node.args[0], (int, float)) or abs(number) < torch.finfo(tensor_value(node).dtype).tiny:
            return None
        number, target = 1 / number, aten.mul.Tensor
    elif target is aten.rsub.Scalar:
        target, swap = aten.sub.Tensor, True
    limits = torch.finfo(tensor_value(node).dtype)
    if number and math.isfinite(number) and not limits.tiny <= abs(number) <= limits.max:
        return None  # the operator computes with the scalar in a wider dtype
    constant = constant_before(module, node, number)
    target = _TENSOR_FORM.get(target, target)
    operands = [constant if isinstance(a, (int, float)) else a for a in node.args[:2]]
    return call_before(node, target, *(reversed(operands) if swap else operands))


NUMBER_REWRITES: dict[OpOverload, Rewrite] = dict.fromkeys(
    (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Scalar, *_TENSOR_FORM),
    scalar_operand,
)
