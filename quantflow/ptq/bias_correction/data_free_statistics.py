"""Data-free statistics: means of a network's activations, from the batch norms that were folded into its layers."""

from __future__ import annotations

import math
from typing import NamedTuple

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
    value,
)
from quantflow.graph.batch_norm import OUTPUT_MOMENTS
from quantflow.graph.parameters import is_constant
from quantflow.observers.observation import observer_of
from quantflow.ptq.bias_correction.clipped_normal import clipped_normal
from quantflow.simulation.float_weights import attribute, float_weight

_AVERAGES = frozenset({aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.mean.dim})
_FLATTENS = frozenset({aten.flatten.using_ints, aten.view.default, aten.reshape.default})


class Expected(NamedTuple):
    """Of the channels (dimension 1) of a tensor: the mean, and the standard deviation where that is known; float64."""

    mean: torch.Tensor
    std: torch.Tensor | None


def expected_statistics(graph: GraphModule) -> dict[Node, Expected]:
    """The statistics of each node of ``graph``, as far as they are known.

    The output of a layer with a folded batch norm is normal with that norm's bias and scale; a clamp clips the normal; what is
    added is taken as independent. Zeros that pad an image are not counted.
    """
    found: dict[Node, Expected] = {}
    for node in graph.graph.nodes:
        known = _expected(graph, node, found)
        if known is not None:
            found[node] = known
    return found


def _expected(graph: GraphModule, node: Node, found: dict[Node, Expected]) -> Expected | None:
    if OUTPUT_MOMENTS in node.meta:
        return Expected(*node.meta[OUTPUT_MOMENTS])
    if op(node) is aten.add.Tensor:
        return _sum(node, found)
    source = node.args[0] if node.args else None
    if not isinstance(source, Node) or source not in found:
        return None
    x = found[source]
    if op(node) in INFERENCE_IDENTITIES or observer_of(node, graph) is not None:
        return x
    if (limits := clamp_limits(node)) is not None:
        return None if x.std is None else Expected(*clipped_normal(x.mean, x.std, *limits))
    if op(node) in _AVERAGES:
        return Expected(x.mean, None) if _keeps_the_mean(node) else None
    if op(node) in _FLATTENS:
        return _flattened(node, source, x)
    if op(node) in CONVOLUTIONS | LINEARS:
        return _layer_output(graph, node, x)
    return None


def _sum(node: Node, found: dict[Node, Expected]) -> Expected | None:
    a, b = (found.get(argument(node, name)) for name in ("self", "other"))
    if a is None or b is None or argument(node, "alpha") != 1 or a.mean.shape != b.mean.shape:
        return None
    std = None if a.std is None or b.std is None else torch.hypot(a.std, b.std)
    return Expected(a.mean + b.mean, std)


def _keeps_the_mean(node: Node) -> bool:
    """Whether ``node`` averages within a channel, without padding."""
    if op(node) is aten.mean.dim:
        dims, x = argument(node, "dim"), value(node_argument(node))
        return x is not None and bool(dims) and all(d % x.ndim > 1 for d in dims)
    return op(node) is not aten.avg_pool2d.default or not any(argument(node, "padding"))


def _flattened(node: Node, source: Node, x: Expected) -> Expected | None:
    before, after = value(source), value(node)
    if before is None or after is None or after.ndim != 2:
        return None
    places = int(math.prod(before.shape[2:]))
    if not isinstance(after.shape[1], int) or after.shape[1] != len(x.mean) * places:
        return None
    return Expected(x.mean.repeat_interleave(places), None if x.std is None else x.std.repeat_interleave(places))


def _layer_output(graph: GraphModule, node: Node, x: Expected) -> Expected | None:
    """The mean of a layer without a norm, from that of its input."""
    weight, bias = argument(node, "weight"), argument(node, "bias")
    while isinstance(weight, Node) and observer_of(weight, graph) is not None:
        weight = weight.args[0]
    if not is_constant(weight) or not (bias is None or is_constant(bias)):
        return None
    output = value(node)
    if op(node) in LINEARS and (output is None or output.ndim != 2):
        return None  # its channels are in the last dimension
    matrix = float_weight(weight, attribute(graph, weight)).double()
    if op(node) in CONVOLUTIONS:
        matrix = matrix.flatten(2).sum(2)
    groups = 1 if op(node) in LINEARS else int(argument(node, "groups"))
    mean = (matrix.reshape(groups, -1, matrix.shape[1]) @ x.mean.reshape(groups, -1, 1)).reshape(-1)
    return Expected(mean if bias is None else mean + float_weight(bias, attribute(graph, bias)).double(), None)
