"""Equalization of a prepared graph: factors of channels with the least predicted rounding noise."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.fx import GraphModule, Node
from tqdm import tqdm

from quantflow.data.sample import Inputs
from quantflow.graph.aten import argument, node_argument
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.graph.parameters import is_constant, tensor_of
from quantflow.observers import FixedQParamsObserver, PerGroupMinMaxObserver
from quantflow.observers.observation import affine, observer_of, qparams_of, qparams_of_range, replace_observers
from quantflow.preparation.forms import observing
from quantflow.ptq.channel_scaling import divide_outputs, multiply_inputs, weight_read
from quantflow.ptq.equalization.channel_groups import ChannelGroup, Place, channel_groups
from quantflow.ptq.equalization.rounding_noise import ActivationNoise, ChannelStatistics, RoundingNoise
from quantflow.qparams.qparams import PER_CHANNEL
from quantflow.simulation.fake_quantized import is_affine
from quantflow.simulation.float_network import float_network
from quantflow.simulation.float_weights import FLOAT_WEIGHT, remember_teacher_weight
from quantflow.simulation.interpreter import Interpreter
from quantflow.simulation.quantized_layers import Layer, quantized_layers

_EXPONENTS = (0.25, 0.5, 0.75, 1.0)  # of the largest relative weight of a channel
_SHIFTS = (0.25, 0.5, 0.7, 1.0, 1.4, 2.0, 4.0)  # of all factors, beside channels that can't be scaled
_MARGIN = 1.2  # by which an unseen value may exceed the largest that was seen
_WORTHWHILE = 0.95  # of the noise: factors that leave more are not worth a change
_BATCHES = 8  # that statistics are taken of, at most
_ROWS = 64  # drawn from an example for covariances
_SMALLEST = 1e-3  # relative weight of a channel


@torch.no_grad()
def equalize_prepared(
    graph: GraphModule, sample: Sequence[Inputs], *, progress: bool = True
) -> TrainableGraphModule | None:
    """Return a copy of a prepared ``graph`` whose channels between two layers are scaled for the least rounding noise.

    As :func:`quantflow.ptq.equalize`, which see, a layer's output channels are divided by positive factors and the weights
    that read them are multiplied by the same. Here the bits of the weights and activations are known, and the factors are those
    with the least predicted noise: with 4-bit weights they raise the columns that a row's largest weight leaves few levels, as
    Lin et al. 2024 (AWQ, arXiv:2306.00978) do for important columns; with 8 bits this seldom pays for the coarser activation.
    Where a clamp at a number other than zero (relu6) lies between the layers, a channel is scaled that stays clear of this
    number on ``sample``, before and after.

    Args:
        graph: A prepared and calibrated graph, its batch norms folded; it is left as it was.
        sample: Batches of flat inputs.
        progress: Show a progress bar.

    Returns:
        The copy, in inference mode; None where no factors lower the noise. Ranges follow the factors.
    """
    equal = adopt(graph).eval()
    network = float_network(equal)
    statistics = _statistics(network, channel_groups(network, _unbounded), sample, progress)

    def bounds(_: GraphModule, node: Node, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
        seen = statistics.get(node)
        everything = torch.full((channels,), torch.inf, dtype=torch.float64)
        return (-everything, everything) if seen is None else (_MARGIN * seen.low, _MARGIN * seen.high)

    prepared = _Prepared(equal, statistics)
    changed = False
    for group in channel_groups(network, bounds):
        noises = prepared.noises(group)
        if noises and (factors := _factors(group, noises)) is not None:
            prepared.scale(group, factors)
            changed = True
    equal.recompile()
    return equal if changed else None


def _unbounded(_: GraphModule, __: Node, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bounds of channels that never reach a limit."""
    return torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)


def _statistics(
    network: GraphModule, groups: Sequence[ChannelGroup], sample: Sequence[Inputs], progress: bool
) -> dict[Node, ChannelStatistics]:
    """The statistics of all tensors of ``groups``, of batches from all over ``sample``."""
    places = {node: place for group in groups for node, place in group.tensors.items()}
    found: dict[Node, ChannelStatistics] = {}
    drawn = sample[:: math.ceil(len(sample) / _BATCHES)] if groups else ()
    for batch in tqdm(drawn, desc="channel statistics", unit="batch", disable=not progress, leave=False):
        for node, values in Interpreter(network).run(batch):
            if node in places:
                seen = _of_channels(values[node], places[node])
                found[node] = found[node] + seen if node in found else seen
    return found


def _of_channels(x: torch.Tensor, place: Place) -> ChannelStatistics:
    examples = x.shape[0] if place.axis else 1
    return ChannelStatistics.of(x.unflatten(place.axis, (-1, place.repeat)), place.axis, _ROWS * examples)


class _Prepared:
    """The prepared graph, by the names that its nodes have in its float network too."""

    def __init__(self, graph: TrainableGraphModule, statistics: Mapping[Node, ChannelStatistics]) -> None:
        self.graph, self.statistics = graph, statistics
        self.nodes = {node.name: node for node in graph.graph.nodes}
        self.calls: dict[nn.Module, list[Node]] = {}  # by observer
        for node in graph.graph.nodes:
            if (observer := observer_of(node, graph)) is not None:
                self.calls.setdefault(observer, []).append(node)
        self.layers = {layer.node: layer for layer in quantized_layers(graph, solvable=False).values()}

    def noises(self, group: ChannelGroup) -> list[RoundingNoise]:
        """The noise of each layer that reads ``group``; none where the group can't be scaled."""
        makers, readers = ([self.nodes[node.name] for node in nodes] for nodes in (group.makers, group.readers))
        observers = self._observers(group)
        if len(makers) > 1 or not all(map(self._can_be_scaled, (*makers, *readers))) or not self._is_free(makers[0]):
            return []
        if not all(is_affine(observer) and self._is_own(observer, group) for observer in observers):
            return []
        activations = tuple(ActivationNoise(seen, _levels(observer)) for observer, seen in observers.items())
        return list(self._noises(group, activations))

    def _noises(self, group: ChannelGroup, activations: tuple[ActivationNoise, ...]) -> Iterator[RoundingNoise]:
        for read in group.readers:
            reader, source = self.nodes[read.name], node_argument(read)
            layer, place = self.layers.get(reader), group.tensors[source]
            weight = tensor_of(self.graph, weight_read(reader)).detach().double()
            if place.repeat > 1:  # the places of a channel are to its factor what those of a kernel are
                weight = weight.unflatten(1, (-1, place.repeat))
            groups = len(group.fixed) // weight.shape[1]
            matrices = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
            per_channel = layer is not None and affine(layer.observer).qscheme in PER_CHANNEL
            levels = None if layer is None else _levels(layer.observer)
            seen = self.statistics[source]
            yield RoundingNoise(matrices, seen, seen.conditional_variance(groups), levels, per_channel, activations)

    def _observers(self, group: ChannelGroup) -> dict[nn.Module, ChannelStatistics]:
        """The observers of the tensors of ``group``, with the statistics of what they observe, clipped to their ranges."""
        found: dict[nn.Module, ChannelStatistics] = {}
        for tensor in group.tensors:
            for user in self.nodes[tensor.name].users:
                if (observer := observer_of(user, self.graph)) is not None:
                    seen = self.statistics[tensor]
                    if is_affine(observer) and not _is_dynamic(observer):
                        seen = seen.within(*_range(observer))
                    found[observer] = found[observer] + seen if observer in found else seen
        return found

    def _is_own(self, observer: nn.Module, group: ChannelGroup) -> bool:
        """Whether ``observer`` observes tensors of ``group`` alone."""
        names = {tensor.name for tensor in group.tensors}
        return all(node_argument(call).name in names for call in self.calls[observer])

    def _can_be_scaled(self, node: Node) -> bool:
        """Whether the weight is as it was given, and in float or quantized with a step an output or one for all."""
        read = weight_read(node)
        if FLOAT_WEIGHT in read.meta:  # it was fitted to its grid
            return False
        layer = self.layers.get(node)
        if layer is None:
            return is_constant(argument(node, "weight"))
        return not isinstance(layer.observer, PerGroupMinMaxObserver)

    def _is_free(self, maker: Node) -> bool:
        """Whether the factors of its outputs change nothing about the rounding of a layer's weight."""
        layer = self.layers.get(maker)
        return layer is None or affine(layer.observer).qscheme in PER_CHANNEL

    def scale(self, group: ChannelGroup, factors: torch.Tensor) -> None:
        """Divide the channels of ``group`` by ``factors``, float64 [channels]; the teacher of a training keeps its weights."""
        for node in (*group.makers, *group.readers):
            for read in (weight_read(self.nodes[node.name]), argument(self.nodes[node.name], "bias")):
                if read is not None:
                    remember_teacher_weight(read, tensor_of(self.graph, read))
        for node in group.makers:
            divide_outputs(self.graph, self.nodes[node.name], factors)
        for node in group.readers:
            repeat = group.tensors[node_argument(node)].repeat
            multiply_inputs(self.graph, self.nodes[node.name], factors.repeat_interleave(repeat))
        for node in (*group.makers, *group.readers):
            if (layer := self.layers.get(self.nodes[node.name])) is not None:
                self._observe_weight(layer)
        made: dict[nn.Module, nn.Module] = {
            observer: FixedQParamsObserver.like(observer, *qparams_of_range(affine(observer), *seen.range(factors)))
            for observer, seen in self._observers(group).items()
            if not _is_dynamic(observer)
        }
        replace_observers(self.graph, made)

    def _observe_weight(self, layer: Layer) -> None:
        weight = tensor_of(self.graph, weight_read(layer.node)).detach()
        self.graph.set_submodule(str(layer.weight.target), observing(copy.deepcopy(layer.observer), weight))


def _range(observer: nn.Module) -> tuple[float, float]:
    scale, zero_point = (float(q) for q in qparams_of(observer))
    low, high = ((limit - zero_point) * scale for limit in (affine(observer).quant_min, affine(observer).quant_max))
    return low, high


def _is_dynamic(observer: nn.Module) -> bool:
    return bool(getattr(observer, "is_dynamic", False))


def _levels(observer: nn.Module) -> int:
    return affine(observer).quant_max - affine(observer).quant_min


def _factors(group: ChannelGroup, noises: Sequence[RoundingNoise]) -> torch.Tensor | None:
    """The factors to divide the channels by that have the least noise; None where they are not worth a change."""
    largest = torch.stack([noise.channels.largest for noise in noises]).amax(0)
    if not 0 < float(largest.max()) < float("inf"):
        return None
    weights = torch.stack([noise.relative_weights() for noise in noises]).amax(0).clamp(min=_SMALLEST)

    def noise(factors: torch.Tensor) -> float:
        return sum(of_layer(factors) for of_layer in noises)

    least = _WORTHWHILE * noise(torch.ones_like(largest))
    limited = bool(group.fixed.any() or (group.least > 0).any())
    best = None
    for exponent in _EXPONENTS:
        factors = weights**-exponent
        factors = factors * ((largest / factors).amax() / largest.amax())  # shifts are relative to the range
        for shift in _SHIFTS if limited else (1.0,):
            allowed = torch.where(group.fixed, 1.0, torch.maximum(shift * factors, group.least))
            if (found := noise(allowed)) < least:
                least, best = found, allowed
    return best
