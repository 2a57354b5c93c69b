"""Fake quantization per token, for training with dynamic schemes."""

from __future__ import annotations

import torch

from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.qparams.per_token import round_per_token


class PerTokenFakeQuantize(FakeQuantize):
    """Rounds each row of the last dimension to a grid of its own, as linear layers on dynamic int8 do at run time.

    Nothing is observed: ``scale`` and ``zero_point`` stay as they are made.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.calibrating or not self.fake_quant_enabled else round_per_token(x)
