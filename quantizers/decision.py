"""The decision on one operator: which rule takes it, or why it stays in float."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch.fx import Node

from quantflow.graph.aten import argument, has_argument, is_float_tensor, label, only_user, op, value
from quantflow.graph.batch_norm import normed_layer
from quantflow.graph.constants import constant_values
from quantflow.graph.rewrites.weights import EQUAL_WEIGHTS
from quantizers.override import Override
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


def decide(
    node: Node,
    rule: Rule,
    asked: Scheme | None,
    override: Override | None,
    integers: set[Node],
    written: Set[Node],
    constants: Set[Node],
    refuse: Refusal,
) -> Decision:
    """The decision on ``node``, to which ``rule`` applies.

    Args:
        node: The operator.
        rule: The rule of the backend's table for it.
        asked: The scheme that was asked for, None for float.
        override: The override that asked for it.
        integers: The nodes before it with a quantized value.
        written: The nodes whose memory is written in place where others see it.
        constants: The nodes that follow from constants alone.
        refuse: The quantizer's own check, which comes first.
    """
    candidate = Decision(_chain(node, rule), rule, asked, "", asked, override)
    if asked is None:
        reason = f"override: {override}" if override is not None else "no scheme given"
    else:
        reason = refuse(node) or _refusal(candidate, rule, asked, integers, constants)
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


def _refusal(decision: Decision, rule: Rule, scheme: Scheme, integers: set[Node], constants: Set[Node]) -> str:
    if scheme.activation.dynamic and not rule.dynamic:
        return f"{rule.name} has no dynamic form"
    if scheme.activation.dynamic and EQUAL_WEIGHTS in decision.node.meta:
        return "it sums with equal weights, which gains nothing from integers"
    if rule.weight is not None and (weight := argument(decision.node, rule.weight)) not in constants:
        return "its weight is computed, not constant"
    if rule.weight is not None and (odd := _ungrouped(weight, scheme.weight.group)):
        return odd
    if rule.weight is not None and has_argument(decision.node, "bias"):
        bias = argument(decision.node, "bias")
        if bias is not None and bias not in constants:
            return "its bias is computed, not constant"
    for given in decision.activations():
        if not isinstance(given, Node) or (not is_float_tensor(given) and value(given) is not None):
            return f"its operand {given if not isinstance(given, Node) else label(given)} is no float tensor"
        if given in constants and _is_infinite(given):
            return f"its operand {label(given)} is infinite, which no integer is"
        if (val := value(given)) is not None and val.ndim == 0 and given not in constants:
            return f"its operand {label(given)} has no dimension"
        if rule.output == "shared" and given not in integers:
            return "its input stays in float"
    refusals = rule.refusals if decision.override is not None else rule.refusals + rule.soft_refusals
    return next((said for refuse in refusals if (said := refuse(decision.node))), "")


def _is_infinite(constant: Node) -> bool:
    """Whether some value of ``constant`` is not finite, as in a mask of attention."""
    module = constant.graph.owning_module
    return module is not None and not bool(constant_values(module, [constant])[constant].isfinite().all())


def _ungrouped(weight: Node, group: int) -> str:
    val = value(weight)
    if not group or val is None:
        return ""
    if val.ndim != 2:
        return f"a weight of {val.ndim} dimensions has no groups of inputs"
    return f"its {val.shape[1]} inputs make no groups of {group}" if val.shape[1] % group else ""
