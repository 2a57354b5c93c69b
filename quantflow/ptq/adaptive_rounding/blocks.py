"""Blocks: parts of a prepared graph between cuts, where a single tensor carries everything that quantization changes."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import is_float_tensor, node_argument
from quantflow.observers.observation import observer_of


@dataclass(frozen=True)
class Block:
    """Consecutive nodes of a graph.

    Their inputs are the ends of earlier blocks, quantized or not, constants, and values that are equal in the float network and
    in the integer network, such as masks and shapes.

    Attributes:
        layers: The nodes whose weights are learned.
        nodes: All, in the order of the graph.
        constants: The nodes that depend on no input.
        ends: The float tensors that the rest of the network reads or returns, before an observer quantizes them.
    """

    layers: tuple[Node, ...]
    nodes: tuple[Node, ...]
    constants: frozenset[Node]
    ends: tuple[Node, ...]


def blocks(graph: GraphModule, layers: Collection[Node], together: int) -> list[Block]:
    """Divide ``graph`` into blocks of at least ``together`` of ``layers``, as small as its cuts allow; the last may have fewer.

    A cut is a position in the graph where exactly one of the values that quantization changes is still to be read, and this is
    a float tensor. There is none within a residual block, whose input is read at its end. A block continues after its last
    layer up to the next observer or layer, so that clamps and other functions of one value belong to it. A graph without cuts
    is one block.

    Args:
        graph: A prepared graph.
        layers: The layers to count.
        together: One or more.
    """
    constant, changed = _kinds(graph)
    nodes = [node for node in graph.graph.nodes if node.op != "output"]
    last = {read: node for node in nodes for read in node.all_input_nodes}
    found: list[Block] = []
    alive: set[Node] = set()
    start, cut, count = 0, -1, 0

    def close(end: int) -> None:
        found.append(_block(graph, nodes[start:end], layers, constant, changed, last))

    for position, node in enumerate(nodes):
        is_next = node in layers or (observer_of(node, graph) is not None and node not in constant)
        if cut >= start and is_next:
            close(cut + 1)
            start, count = cut + 1, 0
        count += node in layers
        alive |= {node} & changed & last.keys()
        alive -= {read for read in node.all_input_nodes if last[read] is node}
        if count >= together and len(alive) == 1 and is_float_tensor(_observed(graph, *alive)):
            cut = position
    close(len(nodes))
    return found


def _block(
    graph: GraphModule,
    nodes: list[Node],
    layers: Collection[Node],
    constant: set[Node],
    changed: set[Node],
    last: dict[Node, Node],
) -> Block:
    inside = set(nodes)
    returned = {node for node in nodes if any(user.op == "output" for user in node.users)}
    left = [node for node in nodes if node in changed and (node in returned or last.get(node, node) not in inside)]
    ends = dict.fromkeys(_observed(graph, node) for node in left)
    return Block(
        tuple(node for node in nodes if node in layers),
        tuple(nodes),
        frozenset(inside & constant),
        tuple(node for node in ends if node in inside & changed and is_float_tensor(node)),
    )


def _kinds(graph: GraphModule) -> tuple[set[Node], set[Node]]:
    """The nodes that depend on no input, and those of the others whose value quantization changes (it changes no shapes)."""
    constant: set[Node] = set()
    quantized: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op != "placeholder" and all(read in constant for read in node.all_input_nodes):
            constant.add(node)
        number = isinstance(node.meta.get("val"), int | float | torch.SymInt | torch.SymFloat | torch.SymBool)
        reads = any(read in quantized for read in node.all_input_nodes)
        if not number and (reads or observer_of(node, graph) is not None):
            quantized.add(node)
    return constant, quantized - constant


def _observed(graph: GraphModule, node: Node) -> Node:
    """The tensor that ``node`` observes; ``node`` itself if it is no observer."""
    while observer_of(node, graph) is not None:
        node = node_argument(node)
    return node
