"""Node matching: which nodes of a float graph and of a quantized graph compute the same tensor."""

from __future__ import annotations

import operator
from collections import defaultdict

from torch.fx import Graph, Node

from quantflow.graph.aten import INFERENCE_IDENTITIES, clamp_limits, layer, node_argument, only_user, op, value

_CONVERSIONS = {"quantized_decomposed", "torchao"}


def converts(node: Node) -> bool:
    """Whether ``node`` converts to or from integers, or finds the range to do so at run time."""
    if node.target is operator.getitem:
        return isinstance(node.args[0], Node) and converts(node.args[0])
    return getattr(node.target, "namespace", None) in _CONVERSIONS


def source(node: Node) -> Node:
    """The tensor before the conversions that ``node`` ends."""
    while converts(node):
        node = node_argument(node)
    return node


def computes(node: Node) -> bool:
    """Whether ``node`` calls an operator on tensors, other than a conversion."""
    return node.op == "call_function" and not converts(node) and node.target is not operator.getitem


def matches(quantized: Graph, reference: Graph) -> dict[Node, Node]:
    """For nodes of ``quantized``, those of ``reference`` with the same value in float.

    Nodes are paired by operator and layer, in order, or by name where one graph has more of them; where the layers are not
    known, in order where both graphs call an operator as often. Of what was written as other operators, the last is
    paired, by who reads it. A clamp that the quantized graph lacks, since saturation replaces it, counts to the node
    before it.
    """
    pairs: dict[Node, Node] = {}
    ours, theirs = _by_place(quantized), _by_place(reference)
    for place in ours.keys() & theirs.keys():
        _pair_same(ours[place], theirs[place], pairs)
    _pair_calls(ours, theirs, pairs)
    _pair_backwards(quantized, pairs)
    taken = set(pairs.values())
    for node, match in pairs.items():
        behind = only_user(match)
        while behind is not None and behind not in taken and vanishes(behind):
            pairs[node] = match = behind
            behind = only_user(match)
    return {node: match for node, match in pairs.items() if _alike(node, match)}


def _by_place(graph: Graph) -> dict[tuple[object, str], list[Node]]:
    """Nodes by operator and layer, in order."""
    found: dict[tuple[object, str], list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "placeholder":
            found["placeholder", ""].append(node)
        elif computes(node):
            found[op(node), layer(node)].append(node)
    return found


def _pair_same(ours: list[Node], theirs: list[Node], pairs: dict[Node, Node]) -> None:
    if len(ours) == len(theirs):
        pairs.update(zip(ours, theirs, strict=True))
        return
    names = {node.name: node for node in theirs}
    pairs.update((node, names[node.name]) for node in ours if node.name in names)


def _pair_calls(
    ours: dict[tuple[object, str], list[Node]], theirs: dict[tuple[object, str], list[Node]], pairs: dict[Node, Node]
) -> None:
    """Pair the calls of an operator in order, where the layers are unknown and both graphs have equally many."""
    for target in {target for target, _ in ours}:
        if any(where for (t, where) in ours if t == target) and any(where for (t, where) in theirs if t == target):
            continue
        left = _in_order([nodes for (t, _), nodes in ours.items() if t == target])
        right = _in_order([nodes for (t, _), nodes in theirs.items() if t == target])
        if len(left) == len(right):
            pairs.update(zip(left, right, strict=True))


def _in_order(groups: list[list[Node]]) -> list[Node]:
    return sorted((node for group in groups for node in group), key=lambda node: node)


def _pair_backwards(quantized: Graph, pairs: dict[Node, Node]) -> None:
    """Pair, from the outputs backwards, what a node reads with what its match reads."""
    taken = set(pairs.values())
    for node in reversed(quantized.nodes):
        match = pairs.get(node)
        if match is None or op(match) is not op(node):
            continue
        for ours, theirs in zip(node.args, match.args, strict=False):
            if not isinstance(ours, Node) or not isinstance(theirs, Node):
                continue
            given = source(ours)
            if given in pairs or theirs in taken or not computes(given) or not computes(theirs):
                continue
            pairs[given] = theirs
            taken.add(theirs)


def vanishes(node: Node) -> bool:
    """Whether the quantized graph may omit ``node`` and still compute the same."""
    return clamp_limits(node) is not None or op(node) in INFERENCE_IDENTITIES


def _alike(node: Node, match: Node) -> bool:
    """Whether both are tensors of one shape, as far as the traces tell."""
    ours, theirs = value(node), value(match)
    if ours is None or theirs is None:
        return match.meta.get("val") is None or isinstance(match.meta["val"], type(theirs))
    fixed = [
        (a, b) for a, b in zip(ours.shape, theirs.shape, strict=False) if isinstance(a, int) and isinstance(b, int)
    ]
    return ours.ndim == theirs.ndim and all(a == b for a, b in fixed)
