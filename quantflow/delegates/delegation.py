"""What of a program its delegates run."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node


@dataclass(frozen=True)
class Delegation:
    """Who runs the operators of a program.

    Attributes:
        calls: How many times the program calls a delegate.
        delegated: Operators inside the delegates, by name.
        portable: Operators outside, run by executorch's own kernels, by name.
        floating: Operators inside the delegates that do not stand between integers, by name: those run in float.
        quantized_outside: The nodes outside that convert to or from integers: what was quantized around them is not delegated.
    """

    calls: int
    delegated: Counter[str] = field(default_factory=Counter)
    portable: Counter[str] = field(default_factory=Counter)
    floating: Counter[str] = field(default_factory=Counter)
    quantized_outside: tuple[str, ...] = ()

    @property
    def fraction(self) -> float:
        """The share of operators that delegates run, 0 to 1; 1 for a program without operators."""
        inside, outside = self.delegated.total(), self.portable.total()
        return inside / (inside + outside) if inside + outside else 1.0

    @classmethod
    def of(cls, edge: GraphModule) -> Delegation:
        """Count the operators of a partitioned edge graph."""
        calls, portable, delegated, floating = 0, Counter[str](), Counter[str](), Counter[str]()
        for node in edge.graph.nodes:
            if not _calls(node):
                continue
            if node.target is torch.ops.higher_order.executorch_call_delegate:
                calls += 1
                lowered: Any = getattr(edge, node.args[0].target)
                inside, given = lowered.original_module, set(lowered.original_module.graph_signature.user_inputs)
                delegated.update(_name(n) for n in inside.graph.nodes if _calls(n))
                floating.update(_name(n) for n in _computing(inside.graph) if not _between_integers(n, given))
            else:
                portable[_name(node)] += 1
        outside = tuple(n.name for n in edge.graph.nodes if _converts(n))
        return cls(calls, delegated, portable, floating, outside)

    def __str__(self) -> str:
        lines = [f"{self.fraction:.1%} of operators delegated, in {self.calls} calls"]
        lines += [f"  outside: {count} of {name}" for name, count in self.portable.most_common()]
        return "\n".join(lines)


def _between_integers(node: Node, given: set[str]) -> bool:
    """Whether integers go in and come out: what it reads is dequantized, and what comes out (clamped) is quantized, unless its
    input has a range of its own at run time. ``given`` names the inputs of the program, which are no constants.
    """
    reads = [n for n in node.all_input_nodes if n.op == "call_function" or n.name in given]
    if any(_name(n) == _DYNAMIC for n in reads):
        return True
    behind = list(node.users)
    while len(behind) == 1 and _name(behind[0]) in _CLAMPS:
        behind = list(behind[0].users)
    fused = _name(node) in _CLAMPS
    fed = all(_converts(n, "dequantize") or (fused and _between_integers(n, given)) for n in reads)
    return fed and bool(reads) and all(_converts(n, "quantize") for n in behind)


_CLAMPS = {"aten::relu", "aten::hardtanh", "aten::clamp"}
_DYNAMIC = "quantized_decomposed::dequantize_per_tensor.tensor"


def lowered_modules(edge: GraphModule) -> Iterator[tuple[Any, list[str]]]:
    """Each program handed to a delegate by a partitioned edge graph, with the names of the nodes that compute in it."""
    for node in edge.graph.nodes:
        if node.target is torch.ops.higher_order.executorch_call_delegate:
            lowered: Any = getattr(edge, node.args[0].target)
            yield lowered, [n.name for n in _computing(lowered.original_module.graph)]


def _calls(node: Node) -> bool:
    return node.op == "call_function" and node.target is not operator.getitem


def _computing(graph: Graph) -> list[Node]:
    return [n for n in graph.nodes if _calls(n) and not _converts(n)]


def _converts(node: Node, how: str = "") -> bool:
    """Whether ``node`` converts to or from integers (``how``: ``"quantize"`` or ``"dequantize"`` alone), or finds their range."""
    namespace, _, name = _name(node).partition("::")
    return node.op == "call_function" and namespace in _CONVERSIONS and name.startswith(how)


_CONVERSIONS = {"quantized_decomposed", "torchao"}


def _name(node: Node) -> str:
    return str(getattr(node.target, "_name", None) or getattr(node.target, "__name__", node.target))
