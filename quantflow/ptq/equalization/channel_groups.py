"""Channel groups: tensors whose channels must be scaled alike, with the layers that compute and read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import LINEARS, aten, clamp_limits, op, value
from quantflow.graph.parameters import Reads, reads_of
from quantflow.ptq.channel_scaling import is_scalable
from quantflow.ptq.equalization.activation_bounds import activation_bounds
from quantflow.ptq.equalization.scale_equivariance import commutes, flattened_places

_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})
# The least and the greatest value, float64, of each of so many channels of what a node computes.
Bounds = Callable[[GraphModule, Node, int], tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Place:
    """The position of the channels in a tensor.

    Attributes:
        axis: The dimension of the channels.
        repeat: The number of consecutive entries per channel, after spatial positions were flattened into it.
    """

    axis: int
    repeat: int = 1


@dataclass(eq=False)
class ChannelGroup:
    """Tensors whose channels can be divided by common positive factors without a change of the function.

    Attributes:
        least: The smallest factor to divide each channel by, float64 [channels]; 0 for no limit.
        fixed: Channels that can't be scaled, bool [channels].
        tensors: The tensors, and where their channels are.
        makers: The layers that compute them.
        readers: The layers that read them.
    """

    least: torch.Tensor
    fixed: torch.Tensor
    tensors: dict[Node, Place] = field(default_factory=dict)
    makers: list[Node] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)

    def absorb(self, other: ChannelGroup) -> None:
        """Merge ``other`` into this group."""
        self.least, self.fixed = torch.maximum(self.least, other.least), self.fixed | other.fixed
        self.tensors.update(other.tensors)
        self.makers += other.makers
        self.readers += other.readers


def channel_groups(module: GraphModule, bounds: Bounds = activation_bounds) -> list[ChannelGroup]:
    """The groups of ``module`` with at least one channel to scale and a layer on each side.

    Args:
        module: A graph in float, its batch norms folded.
        bounds: Tells the values before a clamp: a channel that may reach the clamp's limits is not scaled.
    """
    finder = _Finder(module, bounds)
    for node in module.graph.nodes:
        finder.visit(node)
    groups = dict.fromkeys(finder.group_of.values())
    return [g for g in groups if g.makers and g.readers and not g.fixed.all()]


class _Finder:
    """Visits the nodes in order. A tensor computed from a layer's output is in its group until an operator does not commute."""

    def __init__(self, module: GraphModule, bounds: Bounds) -> None:
        self.module, self.bounds = module, bounds
        self.reads: Reads = reads_of(module.graph)
        self.group_of: dict[Node, ChannelGroup] = {}

    def visit(self, node: Node) -> None:
        tensors = [n for n in node.all_input_nodes if n in self.group_of]
        source = node.args[0] if node.args and isinstance(node.args[0], Node) else None
        if is_scalable(self.module, node, self.reads):
            self._read(node, source)
            self._make(node)
        elif op(node) in _SUMS and self._alike(node, tensors):
            self._join(node, tensors)
        elif op(node) is aten.mul.Tensor and (gated := self._gated(node)) is not None:
            self._fix(n for n in tensors if n is not gated)
            self._follow(node, gated, self._place(gated))
        elif source in self.group_of and tensors == [source] and (place := self._passed(node, source)) is not None:
            self._follow(node, source, place)
        else:
            self._fix(tensors)

    def _place(self, node: Node) -> Place:
        return self.group_of[node].tensors[node]

    def _read(self, node: Node, source: Node | None) -> None:
        if source is None or source not in self.group_of:
            return
        axis = source.meta["val"].ndim - 1 if op(node) in LINEARS else 1
        if self._place(source).axis != axis:
            self._fix([source])
        else:
            self.group_of[source].readers.append(node)

    def _make(self, node: Node) -> None:
        axis = node.meta["val"].ndim - 1 if op(node) in LINEARS else 1
        channels = int(node.meta["val"].shape[axis])
        group = ChannelGroup(torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.bool))
        group.tensors[node] = Place(axis)
        group.makers.append(node)
        self.group_of[node] = group

    def _follow(self, node: Node, source: Node, place: Place) -> None:
        group = self.group_of[node] = self.group_of[source]
        group.tensors[node] = place

    def _passed(self, node: Node, source: Node) -> Place | None:
        """The position of the channels after ``node``, None if a scale does not commute; records the limits of a clamp."""
        place = self._place(source)
        if (limits := clamp_limits(node)) is not None:
            self._clamp(node, source, *limits)
            return place
        if commutes(node, place.axis):
            return place
        places = flattened_places(node) if place.axis == 1 else None
        return None if places is None else Place(1, place.repeat * places)

    def _clamp(self, node: Node, source: Node, low: float, high: float) -> None:
        """A limit other than zero fixes every channel that may reach it, and bounds the scale of the others."""
        group = self.group_of[source]
        low_seen, high_seen = self.bounds(self.module, source, len(group.fixed))
        for limit, seen in ((-low, -low_seen), (high, high_seen)):
            if limit == 0 or limit == math.inf:
                continue
            never = seen <= limit if limit > 0 else torch.zeros_like(group.fixed)
            group.fixed = group.fixed | ~never
            group.least = torch.where(never, torch.maximum(group.least, seen / limit), group.least)

    def _alike(self, node: Node, tensors: list[Node]) -> bool:
        if len(tensors) != 2 or len(node.args) < 2:
            return False
        first, second = (self._place(n) for n in tensors)
        examples = min(first.axis, 1)  # no dimension of examples where a linear layer reads features alone
        shapes = [tuple(n.meta["val"].shape)[examples:] for n in tensors]
        return (first.axis, first.repeat) == (second.axis, second.repeat) and shapes[0] == shapes[1]

    def _join(self, node: Node, tensors: list[Node]) -> None:
        kept, other = (self.group_of[n] for n in tensors)
        place = self._place(tensors[0])
        if kept is not other:
            kept.absorb(other)
            self.group_of.update(dict.fromkeys(other.tensors, kept))
        kept.tensors[node] = place
        self.group_of[node] = kept

    def _gated(self, node: Node) -> Node | None:
        """The tensor that ``node`` multiplies by one factor per channel, or by a positive number."""
        first, second = node.args[:2]
        if isinstance(first, Node) and first in self.group_of and isinstance(second, (int, float)) and second > 0:
            return first
        if not isinstance(first, Node) or not isinstance(second, Node) or first is second:
            return None
        for tensor, gate in ((first, second), (second, first)):
            full, small = value(tensor), value(gate)
            if tensor not in self.group_of or full is None or small is None or not full.ndim == small.ndim == 4:
                continue
            if tuple(small.shape[2:]) == (1, 1) and tuple(full.shape[2:]) != (1, 1):
                return tensor
        return None

    def _fix(self, tensors: Iterable[Node]) -> None:
        for node in tensors:
            group = self.group_of[node]
            group.fixed = torch.ones_like(group.fixed)
