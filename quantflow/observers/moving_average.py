"""Moving averages of the extremes of each batch, for ranges that follow training."""

from __future__ import annotations

from typing import Any

import torch

from quantflow.distributed import widest
from quantflow.observers.base import Observer


class MovingAverageMinMaxObserver(Observer):
    """The exponential moving average of each batch's extremes (Jacob et al. 2018, arXiv:1712.05877, section 3.1).

    Args:
        averaging_constant: Weight of the newest batch; 1 takes the newest alone. The first batch counts whole.
        spec: The grid, as for :class:`Observer`.
    """

    def __init__(self, averaging_constant: float = 0.01, **spec: Any) -> None:
        super().__init__(**spec)
        self.averaging_constant = averaging_constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x
        low, high = widest(*self.extremes(x))
        if self.averaging_constant != 1.0:
            # lerp from infinity is no number, so the first batch is chosen, without asking the tensor for its value.
            low = torch.where(self.min_val.isfinite(), torch.lerp(self.min_val, low, self.averaging_constant), low)
            high = torch.where(self.max_val.isfinite(), torch.lerp(self.max_val, high, self.averaging_constant), high)
        self.min_val, self.max_val = low, high
        return x


class PerChannelMovingAverageMinMaxObserver(MovingAverageMinMaxObserver):
    """The same for per-channel schemes (torchao hands ``ch_axis`` only to classes named so)."""


def for_training(observer: Observer, *, weight: bool) -> MovingAverageMinMaxObserver:
    """An observer for the same grid inside fake quantize: activations average over batches, weights are what they are."""
    return MovingAverageMinMaxObserver(1.0 if weight or observer.is_dynamic else 0.01, **observer.spec())
