"""An observer with a fixed scale and zero point, which data do not change."""

from __future__ import annotations

from typing import Any

import torch

from quantflow.observers.base import Observer
from quantflow.qparams.qparams import PER_CHANNEL, SMALLEST_SCALE


class FixedQParamsObserver(Observer):
    """Lets data pass and returns the scale and zero point that it was given.

    Args:
        scale: float32, a scalar or one a channel.
        zero_point: int32, same shape.
        spec: The arguments of :class:`Observer`, by name.

    Example:
        >>> import torch
        >>> from quantflow.observers import FixedQParamsObserver
        >>> observer = FixedQParamsObserver(torch.tensor(0.5), torch.tensor(3))
        >>> _ = observer(torch.randn(8))
        >>> observer.calculate_qparams()
        (tensor(0.5000), tensor(3, dtype=torch.int32))
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
        """Make an observer of the same integers as another one, with a given scale and zero point.

        Args:
            observer: An observer of quantflow or torchao.
            scale: float32, a scalar or one a channel.
            zero_point: int32, same shape.

        Returns:
            The observer.
        """
        given: Any = observer
        if given.qscheme not in PER_CHANNEL:  # torchao's have one element
            scale, zero_point = scale.reshape(()), zero_point.reshape(())
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
        """Do nothing: the scale and zero point do not follow from data."""

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale (float32) and the zero point (int32), scalars or one a channel."""
        return self.scale.clone(), self.zero_point.clone()
