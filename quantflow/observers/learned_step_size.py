"""Learned step size quantization (LSQ): fake quantization whose scale is a trained parameter."""

from __future__ import annotations

import torch
from torch import nn

from quantflow.observers import Observer
from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.observers.observation import has_seen_data
from quantflow.qparams.rounding import round_to_grid


class LearnedStepSize(FakeQuantize):
    """Fake quantization whose scale is trained by the gradient of the loss (LSQ, Esser et al. 2020, arXiv:1902.08153).

    The scale starts from the first range (calibration's, or the first batch's) and follows the data until rounding is turned
    on; from then on the optimizer moves it. The zero point stays. Pass the class to :func:`quantflow.prepare`; for dynamic
    schemes, which have no scale to learn, plain :class:`FakeQuantize` is used. Calibrating again starts anew.

    The optimizer must hold the scales: make it after ``prepare``. They want no weight decay.

    Args:
        observer: The observer of the first range; it also holds dtype, limits and scheme of the integers.
        calibrator: The observer of the first range, where there is calibration before training; by default ``observer``.

    Attributes:
        scale: Parameter, float32, a scalar or one a channel. Its magnitude counts, not its sign.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> graph = qf.export(model, (torch.randn(1, 3, 8, 8),)).module()
        >>> graph = qf.prepare(graph, XNNPACKQuantizer(), qat=True, fake_quantize=qf.LearnedStepSize)
        >>> sum(name.endswith("scale") for name, _ in graph.named_parameters())  # of the input, the weight and the output
        3
    """

    def __init__(self, observer: Observer, calibrator: Observer | None = None) -> None:
        super().__init__(observer, calibrator)
        del self.scale
        self.scale = nn.Parameter(torch.ones_like(observer.min_val))
        self.started = False

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale, positive and at least ``eps``, and the zero point that training uses; conversion uses the same."""
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
        # Equation 4: the gradient of a scale is a sum over all values that it rounds, so it is divided to match theirs in
        # size. The number of features of one sample counts, the batch size does not.
        samples = x.shape[0] if x.ndim else 1
        count = max(x.numel(), 1) / (scale.numel() if self.per_channel or self.calibrator is None else max(samples, 1))
        share = (count * max(-self.quant_min, self.quant_max)) ** -0.5
        scale = scale.detach() + (scale - scale.detach()) * share  # same value, scaled gradient
        return round_to_grid(x, scale, zero_point, self.quant_min, self.quant_max, self.ch_axis)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if f"{prefix}scale" not in state_dict:
            return
        seen = state_dict.get(f"{prefix}activation_post_process.min_val")  # the observer loads later
        self.started = seen is not None and bool(seen.isfinite().all())
