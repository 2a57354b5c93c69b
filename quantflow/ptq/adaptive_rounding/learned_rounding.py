"""Learned rounding of a layer's weight by gradient descent on the layer's output."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quantflow.ptq.adaptive_rounding.soft_rounding import SoftRounding, descend

_ROWS = 256  # per step


@dataclass(frozen=True)
class Rows:
    """Rows of a layer's inputs, and the target outputs for them.

    Attributes:
        x: Inputs, [groups, rows, features].
        y: Outputs, clamped, [groups, rows, outputs].
        weights: The weight of each row's error, [groups, rows].
        bias: Added to the outputs, [groups, 1, outputs].
        limits: The limits of the clamp that follows the layer.
    """

    x: torch.Tensor
    y: torch.Tensor
    weights: torch.Tensor
    bias: torch.Tensor
    limits: tuple[float, float]

    def __getitem__(self, index: torch.Tensor | slice) -> Rows:
        return Rows(self.x[:, index], self.y[:, index], self.weights[:, index], self.bias, self.limits)

    def error(self, weight: torch.Tensor) -> torch.Tensor:
        """The mean squared error of each output with ``weight`` [groups, outputs, features]; [groups, outputs]."""
        found = torch.baddbmm(self.bias, self.x, weight.transpose(1, 2))
        if self.limits != (-math.inf, math.inf):
            found = found.clamp(*self.limits)
        return ((found - self.y).square() * self.weights[..., None]).mean(1)


def learn_rounding(rounding: SoftRounding, rows: Rows, *, iterations: int) -> torch.Tensor:
    """Learn the rounding of least error on ``rows``, each element to one of the two integers around it.

    (Nagel et al. 2020, AdaRound, arXiv:2004.10568, equations 21 to 25.) Outputs are independent, so each error is
    relative to that of nearest rounding; one weight of the regulariser then suits all layers.

    Args:
        rounding: Of the layer's weight.
        rows: What to learn on; each step draws some.
        iterations: Steps of Adam.

    Returns:
        The rounded weight, [groups, outputs, features], in its own unit.
    """
    start = rows.error(rounding.nearest())
    weight_of_error = torch.where(start > 0, rounding.weight.shape[2] / start, 0.0)
    random = torch.Generator().manual_seed(0)
    total = rows.x.shape[1]

    def error(soft: list[torch.Tensor]) -> torch.Tensor:
        few = rows
        if total > _ROWS:
            few = rows[torch.randint(total, (_ROWS,), generator=random).to(rows.x.device)]
        return (few.error(soft[0]) * weight_of_error).sum()

    (found,) = descend([rounding], error, iterations)
    return found
