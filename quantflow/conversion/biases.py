"""Rounding of biases as devices do: int32, with the scale ``input scale · weight scale``.

A converted graph computes in float. With the rounded bias its outputs round as they do on the device. Without it, about one
value in a few thousand rounds differently, and in a deep network these differences grow to a large part of the quantization
noise.
"""

from __future__ import annotations

from typing import cast

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import (
    INFERENCE_IDENTITIES,
    TRANSPOSED_CONVOLUTIONS,
    WEIGHTED,
    argument,
    node_argument,
    op,
    set_argument,
)
from quantflow.graph.parameters import is_constant, read_attribute, reads_of, set_tensor, tensor_of, unused_name
from quantflow.observers.observation import observer_of, qparams_of
from quantflow.qparams.qparams import PER_CHANNEL

decomposed = torch.ops.quantized_decomposed


def separate_biases(module: GraphModule) -> None:
    """Copy shared biases, in place, so that each layer has its own: the scale differs by layer."""
    reads = reads_of(module.graph)
    for node, bias in _biases(module):
        if reads[str(bias.target)] > 1:
            name = unused_name(module, str(bias.target))
            set_tensor(module, name, tensor_of(module, bias).detach().clone(), parameter=True)
            set_argument(node, "bias", read_attribute(module, name, node, bias))


def round_biases(module: GraphModule) -> None:
    """Round, in place, the bias of each layer of a converted graph whose input and weight are quantized."""
    for node, bias in _biases(module):
        step, exact = _step(module, node), tensor_of(module, bias).detach()
        if step is not None and _fits(node, step, exact):
            set_tensor(module, str(bias.target), on_grid(exact, step).to(exact), parameter=True)


def on_grid(bias: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """``bias`` [outputs] rounded to multiples of ``step`` (a scalar or one per output), float64."""
    return (bias.double() / step).round() * step


def as_converted(module: GraphModule) -> dict[Node, torch.Tensor]:
    """The rounded biases of a prepared graph, as conversion will make them, by the node that reads the bias."""
    found = {}
    for node, bias in _biases(module):
        step, exact = _observed_step(module, node), tensor_of(module, bias).detach()
        if step is not None and len(bias.users) == 1 and _fits(node, step, exact):
            found[bias] = on_grid(exact, step.to(exact.device)).to(exact)
    return found


def _fits(layer: Node, step: torch.Tensor, bias: torch.Tensor) -> bool:
    """Whether ``step`` is one per output; for a grouped transposed convolution it is not."""
    grouped = op(layer) in TRANSPOSED_CONVOLUTIONS and argument(layer, "groups") != 1
    return not step.ndim or (step.numel() == bias.numel() and not grouped)


def _biases(module: GraphModule) -> list[tuple[Node, Node]]:
    """Layers with a constant bias, and the node that reads it."""
    layers = [n for n in module.graph.nodes if op(n) in WEIGHTED]
    return [(layer, bias) for layer in layers if is_constant(bias := argument(layer, "bias"))]


def _step(module: GraphModule, layer: Node) -> torch.Tensor | None:
    given, weight = node_argument(layer), argument(layer, "weight")
    if op(given) is not decomposed.dequantize_per_tensor.default:
        return None
    if op(weight) is decomposed.dequantize_per_tensor.default:
        scale = torch.tensor(weight.args[1], dtype=torch.float64)
    elif op(weight) is decomposed.dequantize_per_channel.default:
        scale = tensor_of(module, weight.args[1]).double()
    else:
        return None
    return cast(float, given.args[1]) * scale


def _observed_step(module: GraphModule, layer: Node) -> torch.Tensor | None:
    source = node_argument(layer)
    while op(source) in INFERENCE_IDENTITIES:
        source = node_argument(source)
    given, weight = observer_of(source, module), observer_of(argument(layer, "weight"), module)
    if given is None or weight is None or getattr(given, "is_dynamic", False) or given.qscheme in PER_CHANNEL:
        return None
    if getattr(weight, "group", 0):
        return None
    return qparams_of(given)[0].double() * qparams_of(weight)[0].double()
