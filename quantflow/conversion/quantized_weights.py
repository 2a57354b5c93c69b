"""Quantized constants: weights as integers, with batch norm folded into them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, has_argument, node_argument
from quantflow.graph.batch_norm import NormedLayer
from quantflow.graph.parameters import is_constant, tensor_of
from quantflow.observers.fake_quantize import BatchNormScaledFakeQuantize
from quantflow.observers.observation import affine, has_seen_data, observer_of, qparams_of
from quantflow.qparams.qparams import PER_CHANNEL, SMALLEST_SCALE, broadcast, quantize
from quantflow.upstream.operators import OpOverload

# Devices store a bias as int32 with scale s_in·s_w and accumulate products on it: half the range is left for these.
_LARGEST_BIAS = 2**30


@dataclass
class IntegerTensor:
    """A quantized constant.

    Attributes:
        integers: The integer values, stored as float, in the shape of the constant.
        scale: float32, a scalar or one per channel.
        zero_point: int32, same shape as ``scale``.
        axis: The channel dimension.
    """

    integers: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    axis: int


def integer_constant(module: GraphModule, node: Node, observer: nn.Module, pair: NormedLayer | None) -> IntegerTensor:
    """The constant that ``node`` observes, quantized by ``observer``, with the batch norm of ``pair`` folded into it."""
    weight = tensor_of(module, node_argument(node)).detach()
    if not has_seen_data(observer):
        observer(weight)
    scale, zero_point = (q.to(weight.device) for q in qparams_of(observer))
    given = affine(observer)
    limits, per_channel = (given.quant_min, given.quant_max), given.qscheme in PER_CHANNEL
    axis = int(given.ch_axis) if per_channel else 0
    if not per_channel:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    if pair is None:
        integers = quantize(weight, scale, zero_point, *limits, axis)
    else:
        norm_scale, _ = pair.scale_and_shift(module)
        if isinstance(module.get_submodule(str(node.target)), BatchNormScaledFakeQuantize):
            weight = (weight.double() * pair.per_weight(norm_scale, module)).to(weight.dtype)
            integers = quantize(weight, scale, zero_point, *limits, axis)
        else:
            # Trained unfolded: the integers stay; the sign of each channel's factor goes into them, its size into the scale.
            integers = quantize(weight, scale, zero_point, *limits, axis)
            integers = integers * broadcast(norm_scale.sign().to(integers.dtype), weight.ndim, axis)
            scale = (scale.double() * norm_scale.abs()).float()
    scale = torch.where(scale > 0, scale.float(), SMALLEST_SCALE)
    constant = IntegerTensor(integers, scale, zero_point.to(torch.int32), axis)
    for user in node.users:
        if is_weight(node, user):
            _fit_bias(module, user, constant, pair)
    return constant


def is_weight(node: Node, user: Node) -> bool:
    """Whether ``user`` is a layer whose weight is ``node``."""
    return (
        isinstance(user.target, OpOverload)
        and has_argument(user, "weight")
        and has_argument(user, "bias")
        and argument(user, "weight") is node
    )


def _fit_bias(module: GraphModule, layer: Node, weight: IntegerTensor, pair: NormedLayer | None) -> None:
    """Increase the scale of channels whose bias would overflow int32 on the device."""
    source, bias_node = layer.args[0], argument(layer, "bias")
    observer = observer_of(source, module) if isinstance(source, Node) else None
    if observer is None or getattr(observer, "is_dynamic", False):
        return
    if pair is not None:
        bias = pair.folded_bias(module)
    elif is_constant(bias_node):
        bias = tensor_of(module, bias_node).detach().double()
    else:
        return
    if weight.scale.ndim and bias.numel() != weight.scale.numel():
        return
    input_scale = float(qparams_of(observer)[0])
    smallest = (bias.abs() / (input_scale * _LARGEST_BIAS)).to(weight.scale)
    smallest = smallest if weight.scale.ndim else smallest.max()
    scale = torch.maximum(weight.scale, smallest)
    shrink = broadcast(weight.scale / scale, weight.integers.ndim, weight.axis)
    weight.integers = torch.where(shrink < 1, torch.round(weight.integers * shrink), weight.integers)
    weight.scale = scale
