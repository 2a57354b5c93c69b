"""Learned step size quantization (LSQ): fake quantization whose scale is a parameter like any other."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from quantflow.observers import Observer
from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.observers.observation import has_seen_data
from quantflow.qparams.rounding import round_to_grid


class LearnedStepSize(FakeQuantize):
    """Rounds to a grid whose scale descends the gradient of the loss (Esser et al. 2020, arXiv:1902.08153).

    The scale starts from the first range (calibration's, or the first batch's) and follows the data until rounding is turned
    on; from then on the optimizer moves it. The zero point stays. Pass it to :func:`quantflow.prepare`; for grids taken at
    run time, which have no scale to learn, plain :class:`FakeQuantize` stands in. Calibrating again starts anew.

    The optimizer must hold the scales: make it after ``prepare``. They want no weight decay.

    Attributes:
        scale: Parameter, float32, a scalar or one a channel. Its magnitude counts, not its sign.
    """

    def __init__(self, observer: Observer, calibrator: Observer | None = None) -> None:
        super().__init__(observer, calibrator)
        del self.scale
        self.scale = nn.Parameter(torch.ones_like(observer.min_val))
        self.started = False

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale and zero point that training uses, which are those to convert with."""
        return self.scale.abs().clamp(min=self.eps), self.zero_point

    def update_qparams(self) -> None:
        """Start anew from the range observed so far."""
        scale, self.zero_point = self.activation_post_process.calculate_qparams()
        self.scale.data = scale
        self.started = has_seen_data(self)

    def _follows_data(self) -> bool:
        return not (self.started and self.fake_quant_enabled)

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        scale, zero_point = self.calculate_qparams()
        # Equation 4: a scale sums the gradients of all that it rounds, so its steps are brought to the size of theirs. The
        # features of one sample count, the batch does not.
        samples = x.shape[0] if x.ndim else 1
        count = max(x.numel(), 1) / (scale.numel() if self.per_channel or self.calibrator is None else max(samples, 1))
        share = (count * max(-self.quant_min, self.quant_max)) ** -0.5
        scale = scale.detach() + (scale - scale.detach()) * share  # the value as it is, its gradient scaled
        return round_to_grid(x, scale, zero_point, self.quant_min, self.quant_max, self.ch_axis)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}scale" not in state_dict:
            return
        seen = state_dict.get(f"{prefix}activation_post_process.min_val")  # loaded after this
        self.started = seen is not None and bool(seen.isfinite().all())
