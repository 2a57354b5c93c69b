"""Statistics of a layer's errors, accumulated batch by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

BINS = 16  # over the integer range; one more on each side for values beyond it

_EXACT = 1e-10  # of the signal: what floating point costs


def decibel(ratio: float) -> float:
    """``ratio`` of powers, dB."""
    return 10 * math.log10(ratio) if ratio > 0 else -math.inf


def finite(figure: Any) -> Any:
    """``figure``, or each of several, for JSON: None where it is infinite or no number."""
    if isinstance(figure, (tuple, list)):
        return [finite(f) for f in figure]
    return None if isinstance(figure, float) and not math.isfinite(figure) else figure


@dataclass
class Sums:
    """Sums over all elements seen of one tensor, float64.

    Attributes:
        axis: The channel dimension.
        signal: Of the squared float values.
        local: Of the squared errors that the layer itself adds.
        floor: Of the squared errors that quantization to as many levels costs at least.
        accumulated: Of the squared errors that the quantized network has there.
        weighted: ``local`` and ``floor``, each element weighted by the squared gradient of the outputs.
        effect: Of the errors' expected power at the outputs, in units of the outputs' own power.
        examples: How many examples were seen.
        channels: ``local`` and ``signal`` by channel, [2, channels].
        low: The least float value.
        high: The greatest.
        count: How many elements.
        beyond: How many of them lie beyond the grid.
        histogram: How many lie in each part of the grid, below it and above it, [bins + 2].
    """

    axis: int
    signal: float = 0.0
    local: float = 0.0
    floor: float = 0.0
    accumulated: float = 0.0
    weighted: tuple[float, float] = (0.0, 0.0)
    effect: float = 0.0
    examples: int = 0
    channels: torch.Tensor = field(default_factory=lambda: torch.zeros(2, 1, dtype=torch.float64))
    low: float = math.inf
    high: float = -math.inf
    count: int = 0
    beyond: int = 0
    histogram: torch.Tensor = field(default_factory=lambda: torch.zeros(BINS + 2, dtype=torch.int64))

    def add(
        self,
        exact: torch.Tensor,
        local: torch.Tensor,
        floor: torch.Tensor,
        accumulated: torch.Tensor,
        gradient: torch.Tensor | None,
    ) -> None:
        """Take in one batch: the float values, three kinds of values with errors, and the gradient at the float values."""
        error, least = local - exact, floor - exact
        self.signal += _power(exact)
        self.local += _power(error)
        self.floor += _power(least)
        self.accumulated += _power(accumulated - exact)
        self.count += exact.numel()
        self.low, self.high = min(self.low, float(exact.min())), max(self.high, float(exact.max()))
        other = [d for d in range(exact.ndim) if d != self.axis]
        by_channel = [t.double().square() for t in (error, exact)]
        self.channels = self.channels + torch.stack(
            [(t.sum(other) if other else t).reshape(-1).cpu() for t in by_channel]
        )
        if gradient is None:
            return
        examples = exact.shape[0] if exact.ndim > 1 else 1
        moved = (gradient * error).double()
        self.weighted = (self.weighted[0] + _power(moved), self.weighted[1] + _power(gradient * least))
        self.effect += float(moved.reshape(examples, -1).sum(1).square().sum())

    def place(self, exact: torch.Tensor, ends: tuple[float, float], step: float) -> None:
        """Count the float values of one batch in each part of the integer range, and beyond it."""
        low, high = ends
        self.beyond += int(((exact < low - step / 2) | (exact > high + step / 2)).sum())
        bins = ((exact - low) * (BINS / max(high - low, step))).floor()
        bins = torch.where(exact == high, BINS - 1.0, bins).clamp(-1, BINS).long() + 1
        self.histogram += torch.bincount(bins.flatten(), minlength=BINS + 2).cpu()

    @property
    def excess(self) -> float:
        """The ratio, dB, of the layer's own error to the least error with as many levels, weighted by output gradients."""
        local, floor = self.weighted if self.weighted[1] > 0 else (self.local, self.floor)
        share = floor / self.floor if self.floor > 0 and self.weighted[1] > 0 else 1.0
        return decibel(local / max(floor, share * _EXACT * self.signal, 1e-300))


def _power(x: torch.Tensor) -> float:
    return float(x.double().square().sum())
