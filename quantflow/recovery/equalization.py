"""Cross-layer equalization: the channels between two layers brought to like ranges, exactly in float."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quantflow.aten import clamp_limits, only_user
from quantflow.batch_norm import fold_batch_norm
from quantflow.batches import PickInputs
from quantflow.errors import QuantflowWarning
from quantflow.graph_module import TrainableGraphModule, adopt
from quantflow.recovery.channel_groups import ChannelGroup, channel_groups
from quantflow.recovery.channel_ranges import channel_ranges
from quantflow.recovery.given import check_float, draw
from quantflow.recovery.sample import Sample
from quantflow.recovery.scaling import (
    divide_outputs,
    is_depthwise,
    largest_by_input,
    largest_by_output,
    multiply_inputs,
)

_STAGE = "equalize"
_SWEEPS = 40
_SETTLED = 1e-3  # a sweep that scales no channel by more is the last
_SMALLEST = 1e-3  # of the largest channel: what is smaller is not raised to it


@torch.no_grad()
def equalize(
    graph: GraphModule, data: Sample | Iterable[Any] | None = None, *, inputs: PickInputs | None = None
) -> TrainableGraphModule:
    """A copy of ``graph`` in which channels between layers have like ranges; its function in float is the same.

    A layer's output channels are divided by positive numbers, and the layers that read them multiply their weights by the same
    (Nagel et al. 2019, arXiv:1906.04721, section 4.1). The numbers pass relu, leaky relu, prelu, pools, padding, flattening,
    gates and sums, all of whose terms are scaled alike; whatever else meets a tensor leaves it as it is. A clamp at a number
    other than zero (relu6) does not commute with them: a channel there is scaled only where it is proven never to reach that
    number, before and after.

    With ``data``, what is equalized is the range of each activation's channels, which share one grid, against the columns of
    the weights that read it as their per-channel grids see them; depthwise weights have a grid for each column, and leave all
    the gain to the activation. Without, it is the weights' ranges, as in the paper, which is for grids that are per tensor.

    It hurts where channels that matter little are raised to the level of those that matter, where a few columns of a weight
    must grow so large that the others lose their levels, and, without data, where weights are per channel already.

    Args:
        graph: What ``Exported.module()`` returned, before :func:`quantflow.prepare`; it is left as it was. Its batch norms are
            folded in the copy, which is for PTQ.
        data: The sample that :func:`quantflow.calibrate` drew, or batches to draw one from; labels are not used.
        inputs: Picks the inputs out of a batch, where that is ambiguous.

    Raises:
        QuantflowError: at stage ``"equalize"``, when the graph is none or prepared already, or a batch does not fit it.
    """
    check_float(graph, _STAGE)
    equal = adopt(graph)
    training = equal.training
    equal.eval()
    fold_batch_norm(equal)
    groups = channel_groups(equal)
    if not groups:
        reason = "no two layers with only what a scale of channels passes between them: the graph stays as it is"
        remedy = "nothing to do; relu6 and smooth activations (silu, gelu, hardswish) let no scale pass"
        warnings.warn(QuantflowWarning(_STAGE, reason, node="graph", remedy=remedy), stacklevel=2)
    elif data is None:
        _by_weights(equal, groups)
    else:
        _by_activations(equal, groups, draw(equal, data, stage=_STAGE, inputs=inputs))
    equal.recompile()
    return equal.train(training)


def _by_weights(module: GraphModule, groups: list[ChannelGroup]) -> None:
    """Until the weights that make a channel are as large as those that read it."""
    for _ in range(_SWEEPS):
        largest = 0.0
        for group in groups:
            made = torch.stack([largest_by_output(module, layer) for layer in group.makers]).amax(0)
            read = torch.stack([_by_channel(module, group, layer) for layer in group.readers]).amax(0)
            scale = _allowed(group, (made / read).sqrt())
            _scale(module, group, scale)
            largest = max(largest, float(scale.log().abs().max()))
        if largest < _SETTLED:
            break


def _by_activations(module: GraphModule, groups: list[ChannelGroup], sample: tuple) -> None:
    """Until each activation's channels and the columns that read them fill their grids alike."""
    axes = {node: place.axis for group in groups for node, place in group.tensors.items()}
    ranges = channel_ranges(module, axes, sample)
    for group in groups:
        seen = [ranges[n].reshape(-1, p.repeat).amax(1) for n, p in group.tensors.items() if not _is_clamped(n)]
        activation = torch.stack(seen).amax(0)
        if not 0 < activation.max() < float("inf"):
            continue
        activation = activation.clamp(min=float(activation.max()) * _SMALLEST)
        for _ in range(_SWEEPS):
            scale = _allowed(group, _by_range(module, group, activation))
            _scale(module, group, scale)
            activation = activation / scale
            if float(scale.log().abs().max()) < _SETTLED:
                break


def _by_range(module: GraphModule, group: ChannelGroup, activation: torch.Tensor) -> torch.Tensor:
    """What to divide each channel by, given how large it gets."""
    readers = [layer for layer in group.readers if not is_depthwise(module, layer)]
    columns = [_by_channel(module, group, layer, relative=True) for layer in readers]
    scale = (activation / torch.stack(columns).amax(0)).sqrt() if columns else activation
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    # The tensor's range stays, and its channels fill it: those that can't be scaled lie within it already.
    return scale * ((activation / scale).max() / activation.max())


def _is_clamped(node: Node) -> bool:
    """Whether ``node`` only goes into a clamp, with which it shares a grid."""
    user = only_user(node)
    return user is not None and clamp_limits(user) is not None


def _by_channel(module: GraphModule, group: ChannelGroup, layer: Node, *, relative: bool = False) -> torch.Tensor:
    """The largest weight of ``layer`` that meets each channel of the group that it reads."""
    largest = largest_by_input(module, layer, relative=relative)
    return largest.reshape(len(group.fixed), -1).amax(1)


def _allowed(group: ChannelGroup, scale: torch.Tensor) -> torch.Tensor:
    """``scale`` where it is one that the group's channels can take."""
    usable = scale.isfinite() & (scale > 0) & ~group.fixed
    return torch.where(usable, torch.maximum(scale, group.least), 1.0)


def _scale(module: GraphModule, group: ChannelGroup, scale: torch.Tensor) -> None:
    for layer in group.makers:
        divide_outputs(module, layer, scale)
    for layer in group.readers:
        repeat = group.tensors[layer.args[0]].repeat  # type: ignore[index]
        multiply_inputs(module, layer, scale.repeat_interleave(repeat))
    group.least = group.least / scale
