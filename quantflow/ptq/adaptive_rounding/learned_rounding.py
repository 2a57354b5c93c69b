"""Rounding a layer's weights up or down by gradient descent on what the layer puts out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from quantflow.ptq.adaptive_rounding.soft_rounding import SoftRounding, descend

_ROWS = 256  # a step's


@dataclass(frozen=True)
class Rows:
    """Rows of a layer's inputs, and of the outputs that are wanted for them.

    Attributes:
        x: Inputs, [groups, rows, features].
        y: Outputs, clamped, [groups, rows, outputs].
        weights: How much each row counts, [groups, rows].
        bias: Added to the outputs, [groups, 1, outputs].
        limits: Between which numbers what follows the layer clamps the outputs.
    """

    x: torch.Tensor
    y: torch.Tensor
    weights: torch.Tensor
    bias: torch.Tensor
    limits: tuple[float, float]

    def __getitem__(self, index: torch.Tensor | slice) -> Rows:
        return Rows(self.x[:, index], self.y[:, index], self.weights[:, index], self.bias, self.limits)

    def error(self, weight: torch.Tensor) -> torch.Tensor:
        """The mean squared error that ``weight`` [groups, outputs, features] leaves in each output, [groups, outputs]."""
        found = torch.baddbmm(self.bias, self.x, weight.transpose(1, 2))
        if self.limits != (-math.inf, math.inf):
            found = found.clamp(*self.limits)
        return ((found - self.y).square() * self.weights[..., None]).mean(1)


def learn_rounding(rounding: SoftRounding, rows: Rows, *, iterations: int) -> torch.Tensor:
    """The weight of least error in ``rows``, each element at one of the two integers around it.

    (Nagel et al. 2020, AdaRound, arXiv:2004.10568, equations 21 to 25.) Outputs are problems of their own, so each counts in
    units of the error that nearest rounding leaves it; one price of the regulariser then serves all layers.

    Args:
        rounding: Of the layer's weight.
        rows: What to learn on; each step draws some.
        iterations: Steps of Adam.

    Returns:
        The rounded weight, [groups, outputs, features], in its own unit.
    """
    start = rows.error(rounding.nearest())
    price = torch.where(start > 0, rounding.weight.shape[2] / start, 0.0)
    random = torch.Generator().manual_seed(0)
    total = rows.x.shape[1]

    def error(soft: list[torch.Tensor]) -> torch.Tensor:
        few = rows
        if total > _ROWS:
            few = rows[torch.randint(total, (_ROWS,), generator=random).to(rows.x.device)]
        return (few.error(soft[0]) * price).sum()

    (found,) = descend([rounding], error, iterations)
    return found
