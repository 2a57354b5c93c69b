"""Cross-layer equalization: scales the channels between two layers to similar ranges, exactly in float."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch.fx import GraphModule, Node

from quantflow.data.batches import PickInputs
from quantflow.data.sample import Inputs, Sample
from quantflow.errors import QuantflowWarning
from quantflow.graph.aten import clamp_limits, node_argument, only_user
from quantflow.graph.folding import fold_for_inference
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.ptq.channel_ranges import channel_ranges
from quantflow.ptq.channel_scaling import divide_outputs, magnitudes, multiply_inputs
from quantflow.ptq.equalization.channel_groups import ChannelGroup, channel_groups
from quantflow.simulation.preconditions import check_float, draw

_STAGE = "equalize"
_SWEEPS = 40
_TOLERANCE = 5e-3  # sweeps end once none changes the logarithm of a scale by more
_TINY = torch.finfo(torch.float32).tiny
_SMALLEST = 1e-3  # smallest range of a channel, relative to the largest


@torch.no_grad()
def equalize(
    graph: GraphModule, data: Sample | Iterable[object] | None = None, *, inputs: PickInputs | None = None
) -> TrainableGraphModule:
    """Return a copy of ``graph`` in which the channels between layers have similar ranges; its function in float is the same.

    A layer's output channels are divided by positive factors, and the layers that read them multiply their weights by the same
    (Nagel et al. 2019, arXiv:1906.04721, section 4.1). The factors pass relu, leaky relu, prelu, pools, padding, flattening,
    gates and sums, all of whose terms are scaled alike; a tensor that any other operator reads is not scaled. A clamp at a
    number other than zero (relu6) does not commute with them: a channel there is scaled only where it is proven never to reach
    that number, before and after.

    With ``data``, the range of each activation's channels, which share one scale, is equalized against the columns of the
    weights that read it, relative to their per-channel scales; depthwise weights have a scale for each column, and leave all
    the gain to the activation. Without data, the ranges of the weights are equalized, as in the paper, which is for per-tensor
    weights.

    It hurts where unimportant channels are raised to the range of important ones, where a few columns of a weight grow so large
    that the others lose resolution, and, without data, where weights are quantized per channel.

    Args:
        graph: What ``Exported.module()`` returned, before :func:`quantflow.prepare`; it is left as it was. Its batch norms are
            folded in the copy, which is for PTQ.
        data: The sample that :func:`quantflow.calibrate` drew, or batches to draw one from; labels are not used.
        inputs: Picks the inputs out of a batch, where that is ambiguous.

    Returns:
        The copy. A warning says where there was nothing to equalize.

    Raises:
        QuantflowError: at stage ``"equalize"``, when the graph is none or prepared already, or a batch does not fit it.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantflow.ptq import equalize
        >>> x = torch.randn(8, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)).eval()
        >>> graph = qf.export(model, (x,)).module()
        >>> torch.allclose(equalize(graph)(x), graph(x), atol=1e-4)
        True
    """
    check_float(graph, _STAGE)
    equal = adopt(graph)
    training = equal.training
    equal.eval()
    fold_for_inference(equal)
    groups = channel_groups(equal)
    if not groups:
        reason = "no two layers with only what a scale of channels passes between them: the graph stays as it is"
        remedy = "nothing to do; relu6 and smooth activations (silu, gelu, hardswish) let no scale pass"
        warnings.warn(QuantflowWarning(_STAGE, reason, node="graph", remedy=remedy), stacklevel=2)
    else:
        sample = None if data is None else draw(equal, data, stage=_STAGE, inputs=inputs)
        for group, scale in _scales(equal, groups, sample).items():
            for layer in group.makers:
                divide_outputs(equal, layer, scale)
            for layer in group.readers:
                multiply_inputs(equal, layer, scale.repeat_interleave(_repeat(group, layer)))
    equal.recompile()
    return equal.train(training)


def _scales(
    module: GraphModule, groups: list[ChannelGroup], sample: Sequence[Inputs] | None
) -> dict[ChannelGroup, torch.Tensor]:
    """The factors to divide the channels of each group by, float64: sweeps over the groups until they converge."""
    weights = {layer: magnitudes(module, layer) for group in groups for layer in (*group.makers, *group.readers)}
    activations = {} if sample is None else _activations(module, groups, sample)
    found = {group: torch.ones_like(group.least) for group in groups}
    for _ in range(_SWEEPS):
        largest = 0.0
        for group in groups:
            activation = activations.get(group)
            if sample is None:
                wanted = _by_weights(weights, group)
            elif activation is not None:
                wanted = _by_activation(weights, group, activation / found[group])
            else:
                continue
            total = torch.maximum(found[group] * wanted, group.least)
            step = torch.where(group.fixed | ~total.isfinite() | (total <= 0), 1.0, total / found[group])
            found[group] *= step
            for layer in group.makers:
                weights[layer].div_(step.reshape(*weights[layer].shape[:2], 1))
            for layer in group.readers:
                columns = step.repeat_interleave(_repeat(group, layer))
                weights[layer].mul_(columns.reshape(len(weights[layer]), 1, -1))
            largest = max(largest, float(step.log().abs().max()))
        if largest < _TOLERANCE:
            break
    return found


def _by_weights(weights: dict[Node, torch.Tensor], group: ChannelGroup) -> torch.Tensor:
    """The factors that equalize the weights that compute a channel and those that read it."""
    made = torch.stack([weights[layer].amax(2).reshape(-1) for layer in group.makers]).amax(0).double()
    read = torch.stack([_by_channel(weights[layer], group) for layer in group.readers]).amax(0).double()
    return (made / read).sqrt()


def _activations(
    module: GraphModule, groups: list[ChannelGroup], sample: Sequence[Inputs]
) -> dict[ChannelGroup, torch.Tensor]:
    """The largest absolute value of each channel of the groups, where it is finite."""
    axes = {node: place.axis for group in groups for node, place in group.tensors.items() if not _is_clamped(node)}
    ranges = channel_ranges(module, axes, sample)
    found = {}
    for group in groups:
        seen = [ranges[node].reshape(len(group.fixed), -1).amax(1) for node in group.tensors if node in axes]
        largest = torch.stack(seen).amax(0)
        if 0 < largest.max() < float("inf"):
            found[group] = largest.clamp(min=float(largest.max()) * _SMALLEST)
    return found


def _by_activation(weights: dict[Node, torch.Tensor], group: ChannelGroup, activation: torch.Tensor) -> torch.Tensor:
    """The factors that equalize an activation's channels against the weight columns that read them."""
    dense = [w for w in (weights[layer] for layer in group.readers) if w.shape[2] > 1]  # not those of depthwise layers
    columns = [_by_channel(w / w.amax(2, keepdim=True).clamp(min=_TINY), group) for w in dense]
    scale = (activation / torch.stack(columns).amax(0).double()).sqrt() if columns else activation
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    # The tensor's range does not change; channels that can't be scaled lie within it.
    return scale * ((activation / scale).max() / activation.max())


def _is_clamped(node: Node) -> bool:
    """Whether only a clamp reads ``node``: it then shares the clamp's quantization parameters."""
    user = only_user(node)
    return user is not None and clamp_limits(user) is not None


def _by_channel(weight: torch.Tensor, group: ChannelGroup) -> torch.Tensor:
    """The largest of the magnitudes [groups, outputs, inputs] for each channel of the group that the layer reads."""
    return weight.amax(1).reshape(len(group.fixed), -1).amax(1)


def _repeat(group: ChannelGroup, layer: Node) -> int:
    return group.tensors[node_argument(layer)].repeat
