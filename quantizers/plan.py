"""What a quantizer will do to a graph, node by node, decided before anything is done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from torch.fx import Graph, Node

from quantflow.aten import (
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
from quantflow.batch_norm import normed_layer
from quantflow.errors import QuantflowError
from quantflow.parameters import is_constant
from quantizers.override import Override
from quantizers.rule import Refusal, Rule
from quantizers.scheme import Scheme


@dataclass(frozen=True)
class Decision:
    """The fate of one operator and of what is fused behind it.

    Attributes:
        nodes: The operator's node, then the batch norm and the clamp fused with it.
        rule: The rule that applies, None where there is none.
        scheme: The integers it becomes, None where it stays in float.
        reason: Why it stays in float, ``""`` where it does not.
    """

    nodes: tuple[Node, ...]
    rule: Rule | None = None
    scheme: Scheme | None = None
    reason: str = ""

    @property
    def node(self) -> Node:
        """The operator itself."""
        return self.nodes[0]

    @property
    def tail(self) -> Node:
        """The last node of what is fused, whose value is the output."""
        return self.nodes[-1]

    def activations(self) -> list[Node]:
        """The nodes that feed the operator's activations."""
        found = []
        for name in self.rule.inputs if self.rule else ():
            given = argument(self.node, name)
            found += list(given) if isinstance(given, (list, tuple)) else [given]
        return found


@dataclass(frozen=True)
class Plan:
    """The decisions on every operator of a graph, in graph order. ``print`` shows them as a table."""

    decisions: tuple[Decision, ...]

    @property
    def integer(self) -> tuple[Decision, ...]:
        """What becomes integers."""
        return tuple(d for d in self.decisions if d.scheme is not None)

    @property
    def floating(self) -> tuple[Decision, ...]:
        """What stays in float."""
        return tuple(d for d in self.decisions if d.scheme is None)

    def matters(self, decision: Decision) -> tuple[float, float] | None:
        """The part of the range of what ``decision`` computes that its only reader needs; None for all of it."""
        user = only_user(decision.tail)
        reader = self._readers.get(user) if user is not None else None
        return reader.rule.matters if reader is not None and reader.rule is not None else None

    @cached_property
    def _readers(self) -> dict[Node, Decision]:
        return {d.node: d for d in self.integer}

    def __str__(self) -> str:
        rows = [("layer", "node", "operators", "becomes", "why not")]
        for d in self.decisions:
            fused = " + ".join(short_name(op(n)) for n in d.nodes)
            rows.append((layer(d.node) or "-", d.node.name, fused, str(d.scheme) if d.scheme else "float", d.reason))
        widths = [max(len(r[i]) for r in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, f"{len(self.integer)} of {len(self.decisions)} operators become integers"])


def make_plan(
    graph: Graph,
    rules: Sequence[Rule],
    scheme: Scheme | None,
    overrides: Sequence[Override],
    refuse: Refusal = lambda node: None,
) -> Plan:
    """Decide on every operator of ``graph``.

    Raises:
        QuantflowError: at stage ``"plan"``, when an override matches nothing in the graph.
    """
    by_op = {o: rule for rule in rules for o in rule.ops}
    matched: set[Override] = set()
    decided: dict[Node, Decision] = {}
    integers: set[Node] = set()  # nodes whose value lies on an integer grid
    for node in graph.nodes:
        if node.op != "call_function" or node in decided or not _computes(node):
            continue
        if op(node) in INFERENCE_IDENTITIES:
            if node.args[0] in integers:
                integers.add(node)
            continue
        chosen, because = _scheme_for(node, scheme, overrides, matched)
        decision = _decide(node, by_op.get(op(node)), chosen, because, integers, refuse)
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
    return Plan(tuple(dict.fromkeys(decided.values())))


def _computes(node: Node) -> bool:
    return is_float_tensor(node) or isinstance(node.meta.get("val"), (tuple, list))


def _scheme_for(
    node: Node, scheme: Scheme | None, overrides: Sequence[Override], matched: set[Override]
) -> tuple[Scheme | None, str]:
    because = "no scheme given"
    for override in overrides:
        if override.matches(node):
            matched.add(override)
            scheme, because = override.scheme, f"override: {override}"
    return scheme, because


def _decide(
    node: Node, rule: Rule | None, scheme: Scheme | None, because: str, integers: set[Node], refuse: Refusal
) -> Decision:
    if rule is None:
        return Decision((node,), reason=f"no rule for {short_name(op(node))}")
    chain = _chain(node, rule)
    candidate = Decision(chain, rule, scheme)
    reason = because if scheme is None else refuse(node) or _refusal(candidate, rule, scheme, integers)
    return Decision((node,), rule, None, reason) if reason else candidate


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
    if rule.weight is not None and (reason := _ungrouped(argument(decision.node, rule.weight), scheme.weight.group)):
        return reason
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
    return next((reason for refuse in rule.refusals if (reason := refuse(decision.node))), "")


def _ungrouped(weight: Node, group: int) -> str:
    val = value(weight)
    if not group or val is None:
        return ""
    if val.ndim != 2:
        return f"a weight of {val.ndim} dimensions has no groups of inputs"
    return f"its {val.shape[1]} inputs make no groups of {group}" if val.shape[1] % group else ""
