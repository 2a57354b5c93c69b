"""Fake quantization: rounding to the integer grid in float, with a gradient that passes straight through."""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

from quantflow.errors import QuantflowError
from quantflow.observers import Observer
from quantflow.qparams.rounding import round_to_grid


class FakeQuantize(FakeQuantizeBase):
    """Observes a tensor while training and rounds it to the grid that follows from the range.

    The gradient is one inside the range and zero where the grid saturates (straight-through estimator, Bengio et al.
    2013, arXiv:1308.3432). Ranges move in training mode only, and by :func:`quantflow.calibrate`.

    Args:
        observer: Where range and grid come from in training.
        calibrator: Where the first range comes from, when there is calibration before training; by default the same.

    Attributes:
        scale: float32, a scalar or one a channel.
        zero_point: int32, same shape.
        observer_enabled: Whether ranges follow the data while training.
        fake_quant_enabled: Whether the tensor is rounded.
        calibrating: Observe whatever the mode, and let the tensor pass.
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, observer: Observer, calibrator: Observer | None = None) -> None:
        super().__init__()
        del self.fake_quant_enabled, self.observer_enabled  # plain flags: a tensor would have to be read at every call
        self.fake_quant_enabled: bool = True
        self.observer_enabled: bool = True
        self.calibrating: bool = False
        self._observed: bool = False  # anything, in this calibration
        self.activation_post_process = observer
        self.calibrator = calibrator
        self.register_buffer("scale", torch.ones_like(observer.min_val))
        self.register_buffer("zero_point", torch.zeros_like(observer.min_val, dtype=torch.int32))

    def __getattr__(self, name: str) -> Any:
        # The grid is the observer's.
        if name in ("dtype", "quant_min", "quant_max", "qscheme", "ch_axis", "is_dynamic", "eps", "per_channel"):
            return getattr(super().__getattr__("activation_post_process"), name)
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.calibrating:
            self.watching(x.detach())
            self._observed = self._observed or x.numel() > 0
            return x
        if self.is_dynamic:  # a grid of each input's own
            self.activation_post_process(x.detach())
            self.update_qparams()
        elif self.training and self.observer_enabled and self._follows_data():
            self.activation_post_process.observe_together(x.detach())
            self.update_qparams()
        if not self.fake_quant_enabled:
            return x
        return self._round(x)

    @property
    def watching(self) -> Observer:
        """The observer that sees the data of a calibration."""
        return self.calibrator or self.activation_post_process

    def _follows_data(self) -> bool:
        return True

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        return round_to_grid(x, self.scale, self.zero_point, self.quant_min, self.quant_max, self.ch_axis)

    def calibrate(self, calibrating: bool, *, failed: bool = False) -> None:
        """Begin to observe whatever the mode, letting the tensor pass; or end, and start training from that range.

        Where it ``failed``, or nothing was observed, the range that training has reached stays.
        """
        self.calibrating = calibrating
        if calibrating:
            self._observed = False
            return
        if failed or not self._observed:
            return
        if self.calibrator is not None and self.calibrator.min_val.isfinite().all():
            scale, zero_point = self.calibrator.calculate_qparams()
            low, high = ((end - zero_point) * scale for end in (self.quant_min, self.quant_max))
            self.activation_post_process.start_from(low, high)
        self.update_qparams()

    def update_qparams(self) -> None:
        """Take scale and zero point from the range observed so far."""
        self.scale, self.zero_point = self.activation_post_process.calculate_qparams()

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The scale and zero point that training uses, which are those to convert with."""
        return self.scale, self.zero_point

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round the tensor, or let it pass."""
        self.fake_quant_enabled = bool(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        """Let ranges follow the data while training, or freeze them."""
        self.observer_enabled = bool(enabled)

    def with_args(self, **kwargs: Any) -> Any:
        """Not here: made around an observer."""
        raise QuantflowError("prepare", "a FakeQuantize is made around an observer", remedy="FakeQuantize(observer)")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("scale", "zero_point"):
            if prefix + name in state_dict:
                grid = getattr(self, name)
                grid.data = torch.empty_like(state_dict[prefix + name], device=grid.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class BatchNormScaledFakeQuantize(torch.nn.Module):
    """Fake quantize of a weight on the grid it will have once batch norm is folded into it: ``fq(w·s) / s``.

    With ``s = gamma / sqrt(running_var + eps)`` per output channel, ``conv(x, fq(w·s) / s)`` is the convolution whose
    batch-normed result equals that of the folded integer weight, at the cost of a weight instead of two passes over the
    activation. A per-channel symmetric grid scales along with ``s`` and needs none of this.
    """

    def __init__(self, fake_quantize: torch.nn.Module, eps: float, axis: int) -> None:
        super().__init__()
        self.fake_quantize, self.eps, self.axis = fake_quantize, eps, axis

    def forward(self, weight: torch.Tensor, gamma: torch.Tensor | None, running_var: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(running_var + self.eps)
        if gamma is not None:
            scale = scale * gamma
        # A channel that batch norm switches off keeps its weight, and its gradient.
        scale = torch.where(scale.abs() < self.eps**2, torch.ones_like(scale), scale).detach()
        scale = scale.reshape([-1 if d == self.axis else 1 for d in range(weight.ndim)])
        return self.fake_quantize(weight * scale) / scale
