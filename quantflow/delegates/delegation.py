"""What of a program its delegates run."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule


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
            if node.op != "call_function" or node.target is operator.getitem:
                continue
            if node.target is torch.ops.higher_order.executorch_call_delegate:
                calls += 1
                lowered: Any = getattr(edge, node.args[0].target)
                inside = lowered.original_module.graph
                delegated.update(_names(inside))
                floating.update(_name(n) for n in inside.nodes if _computes(n) and not _between_integers(n))
            else:
                portable[_name(node)] += 1
        outside = tuple(n.name for n in edge.graph.nodes if "quantized_decomposed" in str(n.target))
        return cls(calls, delegated, portable, floating, outside)

    def __str__(self) -> str:
        lines = [f"{self.fraction:.1%} of operators delegated, in {self.calls} calls"]
        lines += [f"  outside: {count} of {name}" for name, count in self.portable.most_common()]
        return "\n".join(lines)


def _computes(node: torch.fx.Node) -> bool:
    return (
        node.op == "call_function"
        and node.target is not operator.getitem
        and "quantize" not in getattr(node, "name", "")
    )


def _between_integers(node: torch.fx.Node) -> bool:
    """Whether integers go in and come out: all inputs are dequantized, and what comes out (clamped) is quantized."""
    inputs = [n for n in node.all_input_nodes if n.op == "call_function"]
    behind = list(node.users)
    while len(behind) == 1 and any(name in behind[0].name for name in ("relu", "hardtanh", "clamp")):
        behind = list(behind[0].users)
    fused = any(name in node.name for name in ("relu", "hardtanh", "clamp"))
    fed = all("dequantize" in n.name or (fused and _between_integers(n)) for n in inputs)
    return fed and bool(inputs) and all("quantize" in n.name and "dequantize" not in n.name for n in behind)


def lowered_modules(edge: GraphModule) -> Iterator[tuple[Any, list[str]]]:
    """Each program handed to a delegate by a partitioned edge graph, with the names of the nodes that compute in it."""
    for node in edge.graph.nodes:
        if node.target is torch.ops.higher_order.executorch_call_delegate:
            lowered: Any = getattr(edge, node.args[0].target)
            nodes = [n for n in lowered.original_module.graph.nodes if n.op == "call_function"]
            yield lowered, [n.name for n in nodes if "quantized_decomposed" not in str(n.target)]


def _names(graph: torch.fx.Graph) -> list[str]:
    return [_name(n) for n in graph.nodes if n.op == "call_function" and n.target is not operator.getitem]


def _name(node: torch.fx.Node) -> str:
    return str(getattr(node.target, "_name", None) or getattr(node.target, "__name__", node.target))
