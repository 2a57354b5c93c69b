"""Min-max ranges: the extremes of all that was seen."""

from __future__ import annotations

import torch

from quantflow.observers.base import Observer


class MinMaxObserver(Observer):
    """The least and the greatest value over all data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel():
            low, high = self.extremes(x)
            self.min_val = torch.minimum(self.min_val, low)
            self.max_val = torch.maximum(self.max_val, high)
        return x


class PerChannelMinMaxObserver(MinMaxObserver):
    """The same for per-channel schemes (torchao hands ``ch_axis`` only to classes named so)."""
