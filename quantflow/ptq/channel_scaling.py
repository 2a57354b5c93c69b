"""Scaling of a layer's output and input channels, in its weight and bias."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import CONVOLUTIONS, LINEARS, argument, node_argument, op, value
from quantflow.graph.batch_norm import OUTPUT_MOMENTS
from quantflow.graph.parameters import is_constant, set_tensor, tensor_of
from quantflow.upstream.operators import packet_name

_CONVOLVED = {name: int(name[4]) for name in ("conv1d", "conv2d", "conv3d")}


def is_scalable(module: GraphModule, node: Node, reads: Mapping[str, int]) -> bool:
    """Whether ``node`` is a convolution or linear layer whose weight and bias are constants that no other node reads."""
    if op(node) not in CONVOLUTIONS | LINEARS or (output := value(node)) is None:
        return False
    if op(node) in CONVOLUTIONS and output.ndim != _CONVOLVED[packet_name(op(node))] + 2:  # an unbatched call
        return False
    weight, bias = argument(node, "weight"), argument(node, "bias")
    own = [weight] if bias is None else [weight, bias]
    return all(is_constant(n) and reads[str(n.target)] == 1 for n in own) and _is_float(module, weight)


def _is_float(module: GraphModule, read: Node) -> bool:
    return tensor_of(module, read).is_floating_point()


def weight_read(layer: Node) -> Node:
    """What reads the weight of ``layer``, before its observer where it has one."""
    read: Node = argument(layer, "weight")
    return read if is_constant(read) else node_argument(read)


def divide_outputs(module: GraphModule, layer: Node, scale: torch.Tensor) -> None:
    """Divide each output channel of ``layer`` by ``scale``, float64 [channels]."""
    for read in (weight_read(layer), argument(layer, "bias")):
        if read is not None:
            tensor = tensor_of(module, read).detach()
            by_row = scale.to(tensor.device).reshape(-1, *[1] * (tensor.ndim - 1))
            set_tensor(module, str(read.target), (tensor.double() / by_row).to(tensor.dtype), parameter=True)
    if OUTPUT_MOMENTS in layer.meta:
        layer.meta[OUTPUT_MOMENTS] = tuple(moment / scale.to(moment.device) for moment in layer.meta[OUTPUT_MOMENTS])


def multiply_inputs(module: GraphModule, layer: Node, scale: torch.Tensor) -> None:
    """Multiply each input channel of ``layer``'s weight by ``scale``, float64 [channels]."""
    read = weight_read(layer)
    tensor = tensor_of(module, read).detach()
    scaled = tensor.double() * _by_column(layer, tensor, scale)
    set_tensor(module, str(read.target), scaled.to(tensor.dtype), parameter=True)


def magnitudes(module: GraphModule, layer: Node) -> torch.Tensor:
    """The largest absolute weight between each output and each input channel, [groups, outputs a group, inputs a group]."""
    weight = tensor_of(module, argument(layer, "weight")).detach().abs()
    largest = weight.flatten(2).amax(2) if weight.ndim > 2 else weight
    return largest.reshape(_groups(layer), -1, largest.shape[1])


def _groups(layer: Node) -> int:
    return 1 if op(layer) in LINEARS else int(argument(layer, "groups"))


def _by_column(layer: Node, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``scale`` of the input channels in the shape of the layer's weight [out, in / groups, ...]."""
    groups = _groups(layer)
    columns = scale.to(weight.device).reshape(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1)
    return columns.reshape(weight.shape[0], -1, *[1] * (weight.ndim - 2))
