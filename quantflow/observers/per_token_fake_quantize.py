"""Fake quantization per token, for training with dynamic schemes."""

from __future__ import annotations

import torch

from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.qparams.per_token import round_per_token


class PerTokenFakeQuantize(FakeQuantize):
    """Fake-quantizes each row of the last dimension with its own scale and zero point, as dynamic int8 linear layers do.

    It observes nothing: ``scale`` and ``zero_point`` keep their initial values.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.calibrating or not self.fake_quant_enabled else round_per_token(x)
