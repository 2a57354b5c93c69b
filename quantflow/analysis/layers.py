"""The quantized layers of a prepared graph, by the names of the eager model's modules."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from quantflow.analysis.node_matching import computes, vanishes
from quantflow.graph.aten import layer, node_argument, op
from quantflow.graph.parameters import is_constant
from quantflow.observers.observation import observer_of
from quantflow.upstream.operators import OpOverload


def layer_name(node: Node) -> str:
    """The innermost module that ``node`` was traced from, its own name where it belongs to the model itself."""
    return re.sub(r"@\d+$", "", layer(node)) or node.name


@dataclass(frozen=True)
class Within:
    """A predicate on nodes for a quantizer's overrides: those of one layer, not those of the layers below it.

    Attributes:
        name: The name of the layer.
        operators: The operators of the nodes; none for all.
    """

    name: str
    operators: frozenset[OpOverload] = frozenset()

    def __call__(self, node: Node) -> bool:
        return layer_name(node) == self.name and (not self.operators or op(node) in self.operators)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class QuantizedLayer:
    """One layer, with the observer calls that quantize its weights and its outputs.

    Attributes:
        name: The dotted name of the module, or that of the node where there is no module.
        observers: The calls.
    """

    name: str
    observers: frozenset[Node]


def layers_of(graph: GraphModule) -> tuple[QuantizedLayer, ...]:
    """The quantized layers of a prepared graph, in graph order. A clamp belongs to the layer that it is fused with."""
    found: dict[str, set[Node]] = {n: set() for n in map(layer_name, filter(computes, graph.graph.nodes))}
    for node in observers_in(graph):
        for owner in node.users if _of_readers(node, graph) else [_behind_clamps(node_argument(node))]:
            if computes(owner):
                found[layer_name(owner)].add(node)
    return tuple(QuantizedLayer(name, frozenset(calls)) for name, calls in found.items() if calls)


def observers_in(graph: GraphModule) -> list[Node]:
    """The nodes that call observers."""
    return [node for node in graph.graph.nodes if observer_of(node, graph) is not None]


def still_quantized(graph: GraphModule, floating: Collection[str]) -> frozenset[Node]:
    """The observer calls that are left when a quantizer leaves the layers named ``floating`` in float.

    A tensor stays quantized as long as the layer that makes it, or one that reads it, is quantized.
    """
    names = {quantized.name for quantized in layers_of(graph)} - set(floating)
    kept = set()
    for node in observers_in(graph):
        near = set(node.users)
        if not _of_readers(node, graph):
            near.add(_behind_clamps(node_argument(node)))
        if any(layer_name(n) in names for n in near if computes(n)):
            kept.add(node)
    return frozenset(kept)


def _of_readers(node: Node, graph: GraphModule) -> bool:
    """Whether an observer call belongs to the layer that reads it: it observes a weight, or its range is chosen at run time."""
    return is_constant(node.args[0]) or bool(getattr(observer_of(node, graph), "is_dynamic", False))


def _behind_clamps(node: Node) -> Node:
    while computes(node) and vanishes(node) and isinstance(node.args[0], Node) and len(node.args[0].users) == 1:
        node = node.args[0]
    return node
