"""Counts of the operators that delegates run and of those that stay outside."""

from __future__ import annotations

import json
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule, Node

from quantflow.upstream.operators import qualified_name

if TYPE_CHECKING:
    from executorch.exir.lowered_backend_module import LoweredBackendModule


@dataclass(frozen=True)
class Delegation:
    """The operators of a program, counted by whether a delegate runs them.

    Attributes:
        calls: How many times the program calls a delegate.
        delegated: Operators inside the delegates, by name.
        portable: Operators outside the delegates, which executorch's own kernels run, by name.
        floating: Operators inside the delegates that run in float, by name.
        quantized_outside: The quantize and dequantize nodes outside the delegates. A quantized operator beside them is not
            delegated.
    """

    calls: int
    delegated: Counter[str] = field(default_factory=Counter)
    portable: Counter[str] = field(default_factory=Counter)
    floating: Counter[str] = field(default_factory=Counter)
    quantized_outside: tuple[str, ...] = ()

    @property
    def fraction(self) -> float:
        """The fraction of operators that delegates run, 0 to 1; 1 for a program without operators."""
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
                lowered: LoweredBackendModule = getattr(edge, node.args[0].target)
                inside = _Inside(lowered)
                delegated.update(_name(n) for n in inside.graph.nodes if _calls(n))
                floating.update(_name(n) for n in inside.graph.nodes if computes(n) and not inside.in_integers(n))
            else:
                portable[_name(node)] += 1
        outside = tuple(n.name for n in edge.graph.nodes if _converts(n))
        return cls(calls, delegated, portable, floating, outside)

    def to_json(self) -> str:
        """Return all counts as a JSON object."""
        counts = {name: dict(getattr(self, name)) for name in ("delegated", "portable", "floating")}
        held = {"calls": self.calls, "fraction": self.fraction, **counts}
        return json.dumps({**held, "quantized_outside": list(self.quantized_outside)}, indent=2)

    def __str__(self) -> str:
        lines = [f"{self.fraction:.1%} of operators delegated, in {self.calls} calls"]
        lines += [f"  outside: {count} of {name}" for name, count in self.portable.most_common()]
        return "\n".join(lines)


class _Inside:
    """The program that a delegate compiles."""

    def __init__(self, lowered: LoweredBackendModule) -> None:
        self.graph = lowered.original_module.graph
        self.given = set(lowered.original_module.graph_signature.user_inputs)  # other inputs are constants
        self.tagged = lowered.backend_id == "XnnpackBackend"

    def in_integers(self, node: Node) -> bool:
        """Whether ``node`` runs in integers: its inputs are dequantized and its (clamped) output is quantized, or its input is
        quantized dynamically.
        """
        reads = [n for n in node.all_input_nodes if n.op == "call_function" or n.name in self.given]
        if any(_name(n) in _DYNAMIC for n in reads):
            return True
        behind = list(node.users)
        while len(behind) == 1 and _name(behind[0]) in _CLAMPS:
            behind = list(behind[0].users)
        clamp = _name(node) in _CLAMPS
        fed = all(self._fused(n, "dequantize") or (clamp and self._computed_in_integers(n)) for n in reads)
        return fed and bool(reads) and all(self._fused(n, "quantize") for n in behind)

    def _computed_in_integers(self, node: Node) -> bool:
        return computes(node) and self.in_integers(node)

    def _fused(self, node: Node, how: str) -> bool:
        """Whether ``node`` is a conversion that an adjacent kernel includes. XNNPACK's partitioner tags these conversions.
        All others run on their own, around a float kernel.
        """
        return _converts(node, how) and (not self.tagged or bool(node.meta.get("IS_IMPLICIT_Q_DQ_TAG")))


_CLAMPS = {"aten::relu", "aten::hardtanh", "aten::clamp"}
_DYNAMIC = {"quantized_decomposed::dequantize_per_token", "quantized_decomposed::dequantize_per_tensor.tensor"}


def lowered_modules(edge: GraphModule) -> Iterator[tuple[LoweredBackendModule, list[Node]]]:
    """Yield each program that a partitioned edge graph delegates, with the nodes that compute in it."""
    for node in edge.graph.nodes:
        if node.target is torch.ops.higher_order.executorch_call_delegate:
            lowered: LoweredBackendModule = getattr(edge, node.args[0].target)
            yield lowered, [n for n in lowered.original_module.graph.nodes if computes(n)]


def _calls(node: Node) -> bool:
    return node.op == "call_function" and node.target is not operator.getitem


def computes(node: Node) -> bool:
    """Whether ``node`` is an operator and not a conversion to or from integers."""
    return _calls(node) and not _converts(node)


def _converts(node: Node, how: str = "") -> bool:
    """Whether ``node`` converts to or from integers, or computes quantization parameters. ``how`` restricts the answer to
    ``"quantize"`` or ``"dequantize"``.
    """
    namespace, _, name = _name(node).partition("::")
    return node.op == "call_function" and namespace in _CONVERSIONS and name.startswith(how)


_CONVERSIONS = {"quantized_decomposed", "torchao"}


def _name(node: Node) -> str:
    return qualified_name(node.target) or str(getattr(node.target, "__name__", node.target))
