"""A grid that is fixed: chosen by other means than watching, and not moved by more data."""

from __future__ import annotations

from typing import Any

import torch

from quantflow.observers.base import Observer
from quantflow.qparams.qparams import PER_CHANNEL, SMALLEST_SCALE


class FixedQParamsObserver(Observer):
    """Lets data pass and answers with the scale and zero point that it was given.

    Args:
        scale: float32, a scalar or one a channel.
        zero_point: int32, same shape.
        spec: The grid, as for :class:`Observer`.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor
    resized = (*Observer.resized, "scale", "zero_point")

    def __init__(self, scale: torch.Tensor, zero_point: torch.Tensor, **spec: Any) -> None:
        super().__init__(**spec)
        self.register_buffer("scale", scale.detach().float())
        self.register_buffer("zero_point", zero_point.detach().to(torch.int32))
        self.min_val = (self.quant_min - self.zero_point) * self.scale
        self.max_val = (self.quant_max - self.zero_point) * self.scale

    @classmethod
    def like(cls, observer: torch.nn.Module, scale: torch.Tensor, zero_point: torch.Tensor) -> FixedQParamsObserver:
        """On the grid of ``observer``, ours or torchao's, with another scale and zero point."""
        given: Any = observer
        return cls(
            scale,
            zero_point,
            dtype=given.dtype,
            quant_min=given.quant_min,
            quant_max=given.quant_max,
            qscheme=given.qscheme,
            ch_axis=int(given.ch_axis) if given.qscheme in PER_CHANNEL else 0,
            eps=float(getattr(given, "eps", SMALLEST_SCALE)),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def reset(self) -> None:
        """Nothing was seen, so nothing is forgotten."""

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (float32) and zero point (int32), scalars or one a channel."""
        return self.scale, self.zero_point
