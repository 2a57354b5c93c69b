"""The quantization plan: the decision on each operator of a graph, before the graph is changed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from torch.fx import Graph, Node

from quantflow.errors import QuantflowError
from quantflow.graph.aten import (
    INFERENCE_IDENTITIES,
    argument,
    has_argument,
    is_float_tensor,
    label,
    layer,
    only_user,
    op,
    short_name,
    value,
)
from quantflow.graph.batch_norm import normed_layer
from quantflow.graph.parameters import is_constant
from quantflow.graph.state import written_tensors
from quantflow.text_table import aligned
from quantizers.kernels import FloatKernels
from quantizers.operator_plan import OperatorPlan
from quantizers.override import Override
from quantizers.partition_forecast import Forecast, forecast
from quantizers.rule import Refusal, Rule
from quantizers.scheme import Scheme


@dataclass(frozen=True)
class Decision:
    """What becomes of one operator and of what is fused behind it.

    Attributes:
        nodes: The operator's node, then the batch norm and the clamp fused with it.
        rule: The rule that applies, None where there is none.
        scheme: The scheme it is quantized by, None where it stays in float.
        reason: Why it stays in float, ``""`` where it does not.
        asked: The scheme that was asked for, None where none was.
        override: The override that asked, None where the quantizer's own scheme did.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> graph = qf.export(model, (torch.randn(1, 3, 8, 8),)).module()
        >>> decision = XNNPACKQuantizer().plan(graph).decisions[0]
        >>> decision.rule.name, [node.name for node in decision.nodes], str(decision.scheme)
        ('convolution', ['conv2d', 'relu'], 'int8')
    """

    nodes: tuple[Node, ...]
    rule: Rule | None = None
    scheme: Scheme | None = None
    reason: str = ""
    asked: Scheme | None = None
    override: Override | None = None

    @property
    def node(self) -> Node:
        """The operator's node."""
        return self.nodes[0]

    @property
    def tail(self) -> Node:
        """The last fused node, whose value is the output."""
        return self.nodes[-1]

    def activations(self) -> list[Node]:
        """Return the nodes that feed the operator's activations."""
        return self.operands(self.rule.inputs if self.rule else ())

    def operands(self, names: Sequence[str]) -> list[Node]:
        """Return the nodes that feed arguments of the operator.

        Args:
            names: The names of the arguments in the operator's schema.

        Returns:
            The nodes; an argument that is a list gives each of its members.
        """
        found = []
        for name in names:
            given = argument(self.node, name)
            found += list(given) if isinstance(given, (list, tuple)) else [given]
        return found


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
    lacks: Mapping[Any, str] | None = None,
) -> Plan:
    """Decide on every operator of ``graph``, and forecast the partitioning if ``kernels`` are given. ``lacks`` has the reasons
    for operators without a rule.

    Raises:
        QuantflowError: at stage ``"plan"``, if an override matches no layer of the graph.
    """
    by_op = {o: rule for rule in rules for o in rule.ops}
    matched: set[Override] = set()
    written = written_tensors(graph)
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
        if (rule := by_op.get(op(node))) is not None:
            decision = _decide(node, rule, asked, override, integers, written, refuse)
        else:
            reason = (lacks or {}).get(op(node)) or f"no rule for {short_name(op(node))}"
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
    if kernels is None or any("val" not in n.meta for n in graph.nodes if n.op == "call_function" and n.users):
        return Plan(decisions)
    integer = {n: d.scheme for d in decisions if d.scheme is not None for n in d.nodes}
    dynamic = {n for n, s in integer.items() if s.activation.dynamic}
    return Plan(decisions, forecast(graph, integer.keys(), dynamic, kernels))


def _computes(node: Node) -> bool:
    return is_float_tensor(node) or isinstance(node.meta.get("val"), (tuple, list))


def _override_for(node: Node, overrides: Sequence[Override], matched: set[Override]) -> Override | None:
    found = [override for override in overrides if override.matches(node)]
    matched.update(found)
    return found[-1] if found else None


def _decide(
    node: Node,
    rule: Rule,
    asked: Scheme | None,
    override: Override | None,
    integers: set[Node],
    written: Set[Node],
    refuse: Refusal,
) -> Decision:
    candidate = Decision(_chain(node, rule), rule, asked, "", asked, override)
    if asked is None:
        reason = f"override: {override}" if override is not None else "no scheme given"
    else:
        reason = refuse(node) or _refusal(candidate, rule, asked, integers)
        if not written.isdisjoint(
            candidate.nodes
        ):  # the write would not reach a quantized copy, or would change only the copy
            reason = "it is written in place, or writes, where others see it"
    return Decision((node,), rule, None, reason, asked, override) if reason else candidate


def _chain(node: Node, rule: Rule) -> tuple[Node, ...]:
    chain = [node]
    user = only_user(node)
    if rule.batch_norm and user is not None and normed_layer(user) is not None:
        chain.append(user)
        user = only_user(user)
    if user is not None and op(user) in rule.clamps:
        chain.append(user)
    return tuple(chain)


def _refusal(decision: Decision, rule: Rule, scheme: Scheme, integers: set[Node]) -> str:
    if scheme.activation.dynamic and not rule.dynamic:
        return f"{rule.name} has no dynamic form"
    if rule.weight is not None and not is_constant(argument(decision.node, rule.weight)):
        return "its weight is computed, not constant"
    if rule.weight is not None and (odd := _ungrouped(argument(decision.node, rule.weight), scheme.weight.group)):
        return odd
    if rule.weight is not None and has_argument(decision.node, "bias"):
        bias = argument(decision.node, "bias")
        if bias is not None and not is_constant(bias):
            return "its bias is computed, not constant"
    if all(is_constant(given) for given in decision.activations()):
        return "it computes on constants only"
    for given in decision.activations():
        if not isinstance(given, Node) or (not is_float_tensor(given) and value(given) is not None):
            return f"its operand {given if not isinstance(given, Node) else label(given)} is no float tensor"
        if rule.output == "shared" and given not in integers:
            return "its input stays in float"
    refusals = rule.refusals if decision.override is not None else rule.refusals + rule.soft_refusals
    return next((said for refuse in refusals if (said := refuse(decision.node))), "")


def _ungrouped(weight: Node, group: int) -> str:
    val = value(weight)
    if not group or val is None:
        return ""
    if val.ndim != 2:
        return f"a weight of {val.ndim} dimensions has no groups of inputs"
    return f"its {val.shape[1]} inputs make no groups of {group}" if val.shape[1] % group else ""
