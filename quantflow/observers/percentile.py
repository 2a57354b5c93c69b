"""Ranges that leave out a fixed share of the values at either end."""

from __future__ import annotations

from typing import Any

import torch

from quantflow.errors import QuantflowError
from quantflow.observers.sampled import SampledObserver


class PercentileObserver(SampledObserver):
    """From the ``100 - percentile`` to the ``percentile`` percentile of the sample (McKinstry et al. 2019, arXiv:1809.04191).

    Simple and robust against outliers that mean nothing; it clips as many where outliers mean much.

    Args:
        percentile: In (50, 100]; 100 takes the exact extremes.
        spec: The grid, as for :class:`Observer`.
    """

    def __init__(self, percentile: float = 99.99, **spec: Any) -> None:
        super().__init__(**spec)
        if not 50 < percentile <= 100:
            reason = f"{percentile} does not lie in (50, 100]"
            raise QuantflowError("prepare", reason, node="percentile", remedy="99.9 to 99.999; 100 for min-max")
        self.percentile = percentile

    def choose_range(
        self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The percentiles, for each channel."""
        if self.percentile == 100:
            return low, high
        share = 1 - self.percentile / 100
        ordered = values.sort(1).values
        last = ordered.shape[1] - 1
        return ordered[:, round(share * last)], ordered[:, round((1 - share) * last)]


class PerChannelPercentileObserver(PercentileObserver):
    """The same for per-channel schemes (torchao hands ``ch_axis`` only to classes named so)."""
