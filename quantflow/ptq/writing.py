"""Writing of a layer's quantized weight and its bias into the graph."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import node_argument, set_argument
from quantflow.graph.parameters import read_attribute, set_tensor, tensor_of, unused_name
from quantflow.observers import FixedQParamsObserver
from quantflow.simulation.float_weights import remember_float_weight
from quantflow.simulation.quantized_layers import Layer

QParams = tuple[torch.Tensor, torch.Tensor]  # scale and zero point, scalars or one per output


def write_weight(graph: GraphModule, layer: Layer, weight: torch.Tensor, qparams: QParams) -> None:
    """Set the layer's weight to ``weight``, which ``qparams`` represent exactly, and fix its observer to them."""
    read: Node = node_argument(layer.weight)
    like = tensor_of(graph, read)
    remember_float_weight(read, like)
    set_tensor(graph, str(read.target), weight.reshape(like.shape).to(like), parameter=True)
    graph.set_submodule(str(layer.weight.target), FixedQParamsObserver.like(layer.observer, *qparams))


def add_to_bias(graph: GraphModule, layer: Layer, shift: torch.Tensor) -> None:
    """Add ``shift``, one per output, to the layer's bias; a layer without a bias gets one."""
    read: Node = node_argument(layer.weight)
    if layer.bias is not None:
        bias = tensor_of(graph, layer.bias).detach()
        remember_float_weight(layer.bias, bias)
        set_tensor(graph, str(layer.bias.target), (bias + shift.reshape(-1)).to(bias), parameter=True)
        return
    name = unused_name(graph, f"{read.target!s}_bias")
    like = tensor_of(graph, read)
    set_tensor(graph, name, shift.reshape(-1).to(like.detach()), parameter=True, learns=like.requires_grad)
    bias_read = read_attribute(graph, name, layer.node, layer.node)
    remember_float_weight(bias_read, torch.zeros_like(tensor_of(graph, bias_read)))
    set_argument(layer.node, "bias", bias_read)


def by_output(qparam: torch.Tensor, layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """A scale or zero point, a scalar or one per output, as float64 [groups, outputs a group, 1]."""
    return qparam.double().expand(weight.shape[0]).reshape(layer.groups, -1, 1)
