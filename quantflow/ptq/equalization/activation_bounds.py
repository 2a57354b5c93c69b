"""Activation bounds: ranges of an activation that hold for every input of the network."""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import (
    CONVOLUTIONS,
    INFERENCE_IDENTITIES,
    LINEARS,
    argument,
    aten,
    clamp_limits,
    node_argument,
    op,
)
from quantflow.graph.parameters import is_constant, tensor_of

_BOUNDED = {aten.sigmoid.default: (0.0, 1.0), aten.hardsigmoid.default: (0.0, 1.0), aten.tanh.default: (-1.0, 1.0)}
_WITHIN = INFERENCE_IDENTITIES | {  # outputs within the range of the input
    aten.max_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.mean.dim,
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
}


def activation_bounds(module: GraphModule, layer: Node, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the greatest possible value of each of the ``channels`` of ``layer``'s output, float64.

    Finite where ``layer`` is a convolution or linear layer whose input comes from a clamp or another bounded function.
    """
    low, high = (torch.full((channels,), sign * math.inf, dtype=torch.float64) for sign in (-1, 1))
    if op(layer) not in CONVOLUTIONS | LINEARS:
        return low, high
    weight, bias = argument(layer, "weight"), argument(layer, "bias")
    first, last = _limits(node_argument(layer))
    if not math.isfinite(first) or not math.isfinite(last) or not is_constant(weight):
        return low, high
    first, last = min(first, 0.0), max(last, 0.0)  # padding adds zeros
    rows = tensor_of(module, weight).detach().double().flatten(1)
    up, down = rows.clamp(min=0).sum(1), rows.clamp(max=0).sum(1)
    shift = 0.0 if bias is None else tensor_of(module, bias).detach().double()
    return up * first + down * last + shift, up * last + down * first + shift


def _limits(node: Node) -> tuple[float, float]:
    while op(node) in _WITHIN:
        node = node_argument(node)
    if op(node) in _BOUNDED:
        return _BOUNDED[op(node)]
    return clamp_limits(node) or (-math.inf, math.inf)
