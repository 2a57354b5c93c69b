"""``Rule``: a row in a backend's table, with an operator, the operators fused behind it, and its quantized tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch.fx import Node

from quantflow.upstream.operators import OpOverload

# Returns the reason why a backend can't run a node in integers; None if it can.
Refusal = Callable[[Node], str | None]


@dataclass(frozen=True)
class Rule:
    """An operator that a backend runs in integers, what is fused with it, and which of its tensors are quantized (PTQ and QAT).

    Attributes:
        name: What to call it in a plan.
        ops: The ATen operators it begins with. An in-place form counts as the functional one.
        inputs: The activations among its arguments, by their names in the operator's schema. An argument that is a list of
            tensors stands for each of them.
        symmetric: Those of the inputs that the backend reads without a zero point.
        weight: The argument that is a constant weight, None where there is none.
        weight_axis: The dimension of the weight that holds output channels.
        batch_norm: Whether a batch norm behind it is folded into its weight.
        clamps: Operators that it may be fused with behind that (``relu`` and the like).
        output: ``"own"``: the output has a range of its own, observed behind what is fused. ``"shared"``: the output has the
            scale and zero point of the inputs, and is quantized only where the inputs are.
        dynamic: Whether the backend also runs it with ranges taken at run time.
        effective_range: The part of the input's range outside of which the output hardly changes (a sigmoid beyond ±8): the
            range of an input that nothing else reads is kept to it.
        refusals: Checks on the node; the first that returns a reason keeps it in float.
        soft_refusals: Checks for what the backend runs in integers but is better in float; an override that asks for integers
            outweighs them.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import Rule, RuleQuantizer
        >>> rule = Rule("linear", frozenset({torch.ops.aten.linear.default}), weight="weight")
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Tanh()).eval()
        >>> plan = RuleQuantizer(rules=[rule]).plan(qf.export(model, (torch.randn(1, 8),)).module())
        >>> [operator.becomes for operator in plan.operators]
        ['int8', 'float']
    """

    name: str
    ops: frozenset[OpOverload]
    inputs: tuple[str, ...] = ("input",)
    symmetric: tuple[str, ...] = ()
    weight: str | None = None
    weight_axis: int = 0
    batch_norm: bool = False
    clamps: frozenset[OpOverload] = frozenset()
    output: Literal["own", "shared"] = "own"
    dynamic: bool = False
    effective_range: tuple[float, float] | None = None
    refusals: tuple[Refusal, ...] = ()
    soft_refusals: tuple[Refusal, ...] = ()
