"""Fake quantization: quantize and dequantize in float, with the straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torchao.quantization.pt2e.fake_quantize import FakeQuantizeBase

from quantflow.errors import QuantflowError
from quantflow.observers import Observer
from quantflow.qparams.rounding import round_to_grid


class FakeQuantize(FakeQuantizeBase):
    """Observes a tensor while training, rounds it to the integers of the observed range and returns it in float.

    The gradient is one inside the range and zero where the integers saturate (straight-through estimator, Bengio et al.
    2013, arXiv:1308.3432). Ranges move in training mode and by :func:`quantflow.calibrate`. A dynamic range is that of each
    input, in both modes.

    Args:
        observer: The observer of the range in training; it also holds dtype, limits and scheme of the integers.
        calibrator: The observer of the first range, where there is calibration before training; by default ``observer``.

    Attributes:
        scale: float32, a scalar or one a channel.
        zero_point: int32, same shape.
        observer_enabled: Whether ranges follow the data while training.
        fake_quant_enabled: Whether the tensor is rounded.
        calibrating: Observe whatever the mode, and let the tensor pass.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantflow.observers import MinMaxObserver
        >>> fake_quantize = qf.FakeQuantize(MinMaxObserver())
        >>> _ = fake_quantize(torch.tensor([-1.0, 1.0]))  # in training mode: observes
        >>> x = torch.tensor([0.5, 4.0], requires_grad=True)
        >>> fake_quantize.eval()(x).sum().backward()
        >>> x.grad
        tensor([1., 0.])
    """

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, observer: Observer, calibrator: Observer | None = None) -> None:
        super().__init__()
        del self.fake_quant_enabled, self.observer_enabled  # Python booleans: reading a tensor at every call is slow
        self.fake_quant_enabled: bool = True
        self.observer_enabled: bool = True
        self.calibrating: bool = False
        self._observed: bool = False  # whether this calibration has observed any data
        self.activation_post_process = observer
        self.calibrator = calibrator
        self.register_buffer("scale", torch.ones_like(observer.min_val))
        self.register_buffer("zero_point", torch.zeros_like(observer.min_val, dtype=torch.int32))

    def __getattr__(self, name: str) -> Any:
        # The observer owns the quantization parameters' settings.
        if name in ("dtype", "quant_min", "quant_max", "qscheme", "ch_axis", "is_dynamic", "eps", "per_channel"):
            return getattr(super().__getattr__("activation_post_process"), name)
        return super().__getattr__(name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.calibrating:
            self.watching(x.detach())
            self._observed = self._observed or x.numel() > 0
            return x
        if self.is_dynamic:  # scale and zero point are computed from each input
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
        """The observer that calibration data reach."""
        return self.calibrator or self.activation_post_process

    def _follows_data(self) -> bool:
        return True

    def _round(self, x: torch.Tensor) -> torch.Tensor:
        return round_to_grid(x, self.scale, self.zero_point, self.quant_min, self.quant_max, self.ch_axis)

    def calibrate(self, calibrating: bool, *, failed: bool = False) -> None:
        """Begin to observe whatever the mode, letting the tensor pass; or end, and let training start from the observed range.

        Args:
            calibrating: True begins, False ends.
            failed: Whether the calibration failed. The range that training has reached stays then, as it does where nothing was
                observed.
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
        """Return the scale and zero point that training uses; conversion uses the same."""
        return self.scale, self.zero_point

    def enable_fake_quant(self, enabled: bool = True) -> None:
        """Round the tensor, or let it pass.

        Args:
            enabled: True rounds it.
        """
        self.fake_quant_enabled = bool(enabled)

    def enable_observer(self, enabled: bool = True) -> None:
        """Let ranges follow the data while training, or freeze them.

        Args:
            enabled: True lets them follow.
        """
        self.observer_enabled = bool(enabled)

    def with_args(self, **kwargs: Any) -> Any:
        """Refuse: a FakeQuantize is made around an observer.

        Args:
            kwargs: Not used.

        Returns:
            Nothing; it always raises.

        Raises:
            QuantflowError: always, at stage ``"prepare"``.
        """
        raise QuantflowError("prepare", "a FakeQuantize is made around an observer", remedy="FakeQuantize(observer)")

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        for name in ("scale", "zero_point"):
            if prefix + name in state_dict:
                grid = getattr(self, name)
                grid.data = torch.empty_like(state_dict[prefix + name], device=grid.device)
        super()._load_from_state_dict(state_dict, prefix, *args)


class BatchNormScaledFakeQuantize(torch.nn.Module):
    """Fake quantize of a weight with the scale that it has after batch norm folding: ``fq(w·s) / s``.

    With ``s = gamma / sqrt(running_var + eps)`` per output channel, ``conv(x, fq(w·s) / s)`` is the convolution whose
    batch-normed result equals that of the folded integer weight. It costs two passes over the weight instead of two over the
    activation. Per-channel symmetric scales are proportional to ``s``, so such weights do not need this module.
    """

    def __init__(self, fake_quantize: torch.nn.Module, eps: float, axis: int) -> None:
        super().__init__()
        self.fake_quantize, self.eps, self.axis = fake_quantize, eps, axis

    def forward(self, weight: torch.Tensor, gamma: torch.Tensor | None, running_var: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(running_var + self.eps)
        if gamma is not None:
            scale = scale * gamma
        # A channel with a gamma of zero keeps its weight and its gradient.
        scale = torch.where(scale.abs() < self.eps**2, torch.ones_like(scale), scale).detach()
        scale = scale.reshape([-1 if d == self.axis else 1 for d in range(weight.ndim)])
        return self.fake_quantize(weight * scale) / scale
