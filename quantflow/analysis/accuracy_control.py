"""Accuracy control: leaves the fewest layers in float with which a program stays within an accuracy budget."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Generic, Protocol, TypeVar

from torch.fx import GraphModule

from quantflow.analysis.evaluator import Evaluator
from quantflow.analysis.layers import observers_in, still_quantized
from quantflow.analysis.sensitivity import Sensitivities
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.lowering.program import Program
from quantflow.simulation.partial import PartialNetwork


class _Built(Protocol):
    @property
    def program(self) -> Program: ...


B = TypeVar("B", bound=_Built)


@dataclass(frozen=True)
class RevertedLayer:
    """A layer that was left in float, and why.

    Attributes:
        layer: Its name.
        reason: What it costs in integers.
    """

    layer: str
    reason: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.reason}"


@dataclass(frozen=True)
class AccuracyControl:
    """Whether an accuracy budget was met, and the layers that were left in float for it.

    Attributes:
        max_drop: The share of examples that may be lost, 0 to 1.
        drop: The share that was lost, on the runtime: of accuracy where there are targets, else of agreement with float.
        labelled: Whether there were targets.
        reverted: The layers left in float, each with ``layer`` and ``reason``: those chosen in simulation, then those that
            the runtime needed besides, the costliest first in either part.
        tried: Every program that was measured: how many layers it left in float, and its drop.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> x, data = torch.randn(1, 3, 8, 8), [torch.randn(8, 3, 8, 8)]
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4))
        >>> result = qf.quantize(model.eval(), (x,), data, max_drop=0.9, recover=False, progress=False)
        >>> result.report.accuracy_control.holds, result.report.accuracy_control.reverted
        (True, ())
    """

    max_drop: float
    drop: float
    labelled: bool
    reverted: tuple[RevertedLayer, ...]
    tried: tuple[tuple[int, float], ...]

    @property
    def holds(self) -> bool:
        """Whether the drop is within the budget."""
        return self.drop <= self.max_drop

    def to_json(self) -> str:
        """Return all figures as a JSON object."""
        return json.dumps({"holds": self.holds, **asdict(self)}, indent=2)

    def __str__(self) -> str:
        what = "accuracy" if self.labelled else "agreement with float"
        verdict = "holds" if self.holds else "does not hold"
        lines = [f"budget of {self.max_drop:.2%} {verdict}: {what} drops by {self.drop:.2%} on the runtime"]
        return "\n".join([*lines, *(f"  in float: {layer}" for layer in self.reverted)])


@dataclass(frozen=True)
class Controlled(Generic[B]):
    """What was built, and whether it is within the accuracy budget."""

    built: B
    accuracy_control: AccuracyControl


def keep_within(
    max_drop: float,
    evaluator: Evaluator,
    first: B,
    build: Callable[[Sequence[str]], B],
    prepared: GraphModule,
    find_costs: Callable[[], Sensitivities],
) -> Controlled[B]:
    """``first``, or what ``build`` makes with the fewest layers in float whose program loses at most ``max_drop``.

    Layers come in the order of what each costs alone. How many of them must go, and which of these need not, is found in
    simulation; on the runtime, the costliest one, two, four, ... of these are measured first, then all of them, and more until
    the budget holds there.

    Args:
        max_drop: The share of examples that may be lost, 0 to 1.
        evaluator: What measures the loss.
        first: What was built with all layers quantized.
        build: Builds with the layers of these names in float.
        prepared: The calibrated graph with all layers quantized.
        find_costs: Finds what each layer costs; called when it is needed.
    """
    tried: dict[tuple[str, ...], tuple[B, float]] = {}

    def measure(names: Sequence[str]) -> bool:
        key = tuple(names)
        if key not in tried:
            try:
                built = build(key) if key else first
            except QuantflowError as error:
                if error.stage != "prepare":
                    raise
                return False  # no quantized layer is left that others follow
            tried[key] = built, evaluator.drop_on_runtime(built.program)
        return tried[key][1] <= max_drop

    costs: Sensitivities | None = None
    if not measure(()):
        costs = find_costs()
        order = [cost.layer for cost in costs.layers][:-1]  # with all of them, nothing would be quantized
        chosen = fewest(order, lambda names: _simulated(prepared, evaluator, names) <= max_drop)
        # The runtime decides. Fewer layers may do there, since each float layer also removes roundings of its neighbours.
        if not _fewer(chosen, measure) and not measure(chosen):
            _grow(order, chosen, measure)
    holding = [key for key, (_, drop) in tried.items() if drop <= max_drop]
    best = min(holding, key=len) if holding else min(tried, key=lambda key: (tried[key][1], len(key)))
    built, drop = tried[best]
    reasons = {c.layer: _reason(c.to_integers, costs.all_integers) for c in costs.layers} if costs is not None else {}
    reverted = tuple(RevertedLayer(name, reasons[name]) for name in best)
    counts = tuple((len(key), found) for key, (_, found) in tried.items())
    budget = AccuracyControl(max_drop, drop, evaluator.labelled, reverted, counts)
    if not budget.holds:
        reason = f"the drop is {drop:.2%}, with {len(best)} layers in float; {max_drop:.2%} were allowed"
        remedy = "train the quantized graph (qf.train), give more calibration data, or allow more"
        warnings.warn(QuantflowWarning("accuracy-control", reason, node="the program", remedy=remedy), stacklevel=3)
    return Controlled(built, budget)


def fewest(order: Sequence[str], holds: Callable[[Sequence[str]], bool]) -> list[str]:
    """Return the shortest prefix of ``order`` that ``holds``, by bisection, less the members that are not needed."""
    low, high = 0, len(order)  # no layer is not enough; all layers are assumed to be
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(order[:middle]) else (middle, high)
    chosen = list(order[:high])
    for name in reversed(order[: high - 1]):
        without = [other for other in chosen if other != name]
        if holds(without):
            chosen = without
    return chosen


def _fewer(chosen: Sequence[str], measure: Callable[[Sequence[str]], bool]) -> bool:
    """Whether a proper prefix of ``chosen`` is within the budget. Sizes double from 1; bisection then finds the smallest."""
    low, high = 0, 1
    while high < len(chosen) and not measure(chosen[:high]):
        low, high = high, 2 * high
    if high >= len(chosen):
        return False
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if measure(chosen[:middle]) else (middle, high)
    return True


def _grow(order: Sequence[str], chosen: Sequence[str], measure: Callable[[Sequence[str]], bool]) -> None:
    """Add layers of ``order`` until the budget is met. Their number doubles from 1; bisection then finds the smallest."""
    rest = [name for name in order if name not in chosen]
    low, high = 0, 1
    while not measure([*chosen, *rest[:high]]):
        if high >= len(rest):
            return
        low, high = high, min(2 * high, len(rest))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if measure([*chosen, *rest[:middle]]) else (middle, high)


def _simulated(prepared: GraphModule, evaluator: Evaluator, floating: Sequence[str]) -> float:
    """The drop of the network with these layers in float, in simulation."""
    active = still_quantized(prepared, floating) if floating else frozenset(observers_in(prepared))
    return evaluator.drop_of(lambda flat: PartialNetwork(prepared, flat, active).returned)


def _reason(alone: float, together: float) -> str:
    return f"alone in integers it leaves {alone:.1f} dB at the outputs; all layers together leave {together:.1f} dB"
