"""Warnings of requested quantization that a plan does not fulfill."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.aten import label, op, short_name
from quantizers.decision import Decision
from quantizers.override import Override
from quantizers.plan import Plan

_NAMED = 5


def warn_of_unmet_requests(plan: Plan, *, strict: bool) -> None:
    """Warn, once per override, of layers that it quantizes but that stay in float. Warn once of float operators between
    quantized ones that no delegate runs, unless they were skipped on request.

    Raises:
        QuantflowError: at stage ``"plan"``, instead of the first warning, if ``strict``.
    """
    for override, refused in _refused(plan).items():
        reasons = "; ".join(dict.fromkeys(d.reason for d in refused))
        remedy = "print(quantizer.plan(graph)) tells why; leave it out of the override, or change the layer"
        _complain(f"stays in float, though override {override} asks for integers: {reasons}", refused, remedy, strict)
    leaving = [d for d in plan.float_islands if plan.outside(d) and d.asked is not None]
    if leaving:
        kinds = ", ".join(dict.fromkeys(short_name(op(d.node)) for d in leaving))
        reason = f"float between integers, which no delegate runs ({kinds}): the program calls it {plan.calls} times"
        remedy = "use another operator there, or skip=[...] them where the float between integers is meant"
        _complain(reason, leaving, remedy, strict)


def _refused(plan: Plan) -> dict[Override, list[Decision]]:
    """For each override, its layers with weights that stay in float, or all of its operators if none is quantized."""
    asked: dict[Override, list[Decision]] = {}
    for d in plan.decisions:
        if d.override is not None and d.asked is not None:
            asked.setdefault(d.override, []).append(d)
    refused = {}
    for override, decisions in asked.items():
        weighted = [d for d in decisions if d.rule is not None and d.rule.weight is not None]
        meant = weighted or (decisions if all(d.scheme is None for d in decisions) else [])
        if missing := [d for d in meant if d.scheme is None]:
            refused[override] = missing
    return refused


def _complain(reason: str, decisions: Sequence[Decision], remedy: str, strict: bool) -> None:
    names = ", ".join(label(d.node) for d in decisions[:_NAMED])
    if len(decisions) > _NAMED:
        names += f" and {len(decisions) - _NAMED} more"
    if strict:
        raise QuantflowError("plan", reason, node=names, remedy=remedy)
    warnings.warn(QuantflowWarning("plan", reason, node=names, remedy=remedy), stacklevel=5)
