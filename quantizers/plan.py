"""The quantization plan: the decision on each operator of a graph, before the graph is changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property

from torch.fx import Graph, Node

from quantflow.errors import QuantflowError
from quantflow.graph.aten import (
    INFERENCE_IDENTITIES,
    is_float_tensor,
    layer,
    only_user,
    op,
    short_name,
)
from quantflow.graph.constants import constant_calls
from quantflow.graph.parameters import is_constant
from quantflow.graph.state import written_tensors
from quantflow.text_table import aligned
from quantflow.upstream.operators import OpOverload
from quantizers.decision import Decision, decide
from quantizers.kernels import FloatKernels
from quantizers.operator_plan import OperatorPlan
from quantizers.override import Override, override_for
from quantizers.partition_forecast import Forecast, forecast
from quantizers.rule import Refusal, Rule
from quantizers.scheme import Scheme


@dataclass(frozen=True)
class Plan:
    """The decisions on every operator of a graph, in graph order; ``print`` shows them as a table.

    Attributes:
        decisions: What becomes of each operator.
        forecast: What lowering will make of them; None where the quantizer does not know its backend's float kernels, or the
            graph not the shapes of its tensors.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
        >>> graph = qf.export(model.eval(), (torch.randn(1, 3, 8, 8),)).module()
        >>> plan = XNNPACKQuantizer(skip="0").plan(graph)
        >>> [(operator.layer, operator.becomes) for operator in plan.operators]
        [('0', 'float'), ('1', 'float'), ('2', 'float'), ('3', 'int8')]
        >>> plan.calls
        1
    """

    decisions: tuple[Decision, ...]
    forecast: Forecast | None = None

    @property
    def integer(self) -> tuple[Decision, ...]:
        """The decisions on what becomes integers."""
        return tuple(d for d in self.decisions if d.scheme is not None)

    @property
    def floating(self) -> tuple[Decision, ...]:
        """The decisions on what stays in float."""
        return tuple(d for d in self.decisions if d.scheme is None)

    @property
    def calls(self) -> int | None:
        """How many times the program will call the delegate, for static shapes; None where that is not known."""
        return self.forecast.calls if self.forecast is not None else None

    @cached_property
    def float_islands(self) -> tuple[Decision, ...]:
        """The decisions on what stays in float between integers: behind some, and before others.

        Operators with dynamic schemes do not count as integers: they read and write float.
        """
        behind: set[Node] = set()
        before: set[Node] = set()
        integer = {n for d in self.integer if d.scheme is not None and not d.scheme.activation.dynamic for n in d.nodes}
        nodes = list(self.decisions[0].node.graph.nodes) if self.decisions else []
        for node in nodes:
            if any(given in integer or given in behind for given in node.all_input_nodes):
                behind.add(node)
        for node in reversed(nodes):
            if any(user in integer or user in before for user in node.users):
                before.add(node)
        return tuple(d for d in self.floating if d.node in behind and d.node in before)

    def outside(self, decision: Decision) -> bool:
        """Tell whether some part of an operator is known to be left to portable kernels.

        Args:
            decision: The decision on the operator.

        Returns:
            True where it is; False also where there is no forecast.
        """
        return self.forecast is not None and not self.forecast.outside.isdisjoint(decision.nodes)

    def effective_range(self, decision: Decision) -> tuple[float, float] | None:
        """Return the part of an operator's range that the only reader of its output needs.

        Args:
            decision: The decision on the operator.

        Returns:
            The low and the high end; None for the whole range.
        """
        user = only_user(decision.tail)
        reader = self._readers.get(user) if user is not None else None
        return reader.rule.effective_range if reader is not None and reader.rule is not None else None

    @cached_property
    def _readers(self) -> dict[Node, Decision]:
        return {d.node: d for d in self.integer}

    @property
    def operators(self) -> tuple[OperatorPlan, ...]:
        """The decisions by layer and operator name, for tables and reports."""
        return tuple(
            OperatorPlan(
                layer(d.node),
                d.node.name,
                tuple(short_name(op(n)) for n in d.nodes),
                str(d.scheme) if d.scheme is not None else None,
                self.outside(d),
                d.reason,
            )
            for d in self.decisions
        )

    def to_json(self) -> str:
        """Return what becomes of each operator, and the number of delegate calls (null where not known), as a JSON object."""
        return json.dumps(
            {"operators": [asdict(operator) for operator in self.operators], "calls": self.calls}, indent=2
        )

    def __str__(self) -> str:
        rows = [("layer", "node", "operators", "becomes", "why not")]
        for f in self.operators:
            rows.append((f.layer or "-", f.node, " + ".join(f.operators), f.becomes, f.reason))
        total = f"{len(self.integer)} of {len(self.decisions)} operators become integers"
        if self.float_islands:
            total += f", {len(self.float_islands)} stay in float between them"
        if self.calls is not None:
            total += f"; the delegate is called {self.calls} times" if self.calls != 1 else "; in one delegate call"
        return "\n".join([*aligned(rows), total])


def make_plan(
    graph: Graph,
    rules: Sequence[Rule],
    scheme: Scheme | None,
    overrides: Sequence[Override],
    refuse: Refusal = lambda node: None,
    kernels: FloatKernels | None = None,
    unsupported: Mapping[object, str] | None = None,
) -> Plan:
    """Decide on every operator of ``graph``, and forecast the partitioning if ``kernels`` are given. ``unsupported`` has the
    reasons for operators without a rule.

    Raises:
        QuantflowError: at stage ``"plan"``, if an override matches no layer of the graph.
    """
    by_op = {o: rule for rule in rules for o in rule.ops}
    matched: set[Override] = set()
    written, calls = written_tensors(graph), constant_calls(graph)
    constants = calls.union(filter(is_constant, graph.nodes))
    decided: dict[Node, Decision] = {}
    integers: set[Node] = set()  # nodes with a quantized value
    for node in graph.nodes:
        if node.op != "call_function" or node in decided or not _computes(node):
            continue
        if op(node) in INFERENCE_IDENTITIES:
            if node.args[0] in integers:
                integers.add(node)
            continue
        override = _override_for(node, overrides, matched)
        asked = override.scheme if override is not None else scheme
        if node in calls:
            decision = Decision((node,), None, None, "it computes on constants only", asked, override)
        elif (rule := by_op.get(op(node))) is not None:
            decision = decide(node, rule, asked, override, integers, written, constants, refuse)
        else:
            reason = (unsupported or {}).get(op(node)) or f"no rule for {short_name(op(node))}"
            decision = Decision((node,), None, None, reason, asked, override)
        decided.update(dict.fromkeys(decision.nodes, decision))
        if decision.scheme is not None and not decision.scheme.activation.dynamic:
            integers.add(decision.tail)
    for override in overrides:
        if override not in matched:
            raise QuantflowError(
                "plan",
                "this override matches no layer of the graph",
                node=str(override),
                remedy="check the name: print(quantizer.plan(graph)) lists the layers",
            )
    decisions = tuple(dict.fromkeys(decided.values()))
    if kernels is None or any("val" not in n.meta for n in graph.nodes if n.op == "call_function" and _is_read(n)):
        return Plan(decisions)
    integer = {n: d.scheme for d in decisions if d.scheme is not None for n in d.nodes}
    dynamic = {n for n, s in integer.items() if s.activation.dynamic}
    return Plan(decisions, forecast(graph, integer.keys(), dynamic, calls, kernels))


def _is_read(node: Node) -> bool:
    """Whether an operator or the caller reads the value of ``node``: no setting of a mode, which only ends it."""
    return any(user.op != "call_function" or isinstance(user.target, OpOverload) for user in node.users)


def _computes(node: Node) -> bool:
    return is_float_tensor(node) or isinstance(node.meta.get("val"), (tuple, list))


def _override_for(node: Node, overrides: Sequence[Override], matched: set[Override]) -> Override | None:
    matched.update(override for override in overrides if override.matches(node))
    if (found := override_for(node, overrides)) is not None:
        matched.add(found)
    return found
