"""Rounding weights up or down by gradient descent on what the layer puts out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

_ROWS = 256  # a step's
_TRAVEL = 20.0  # how far a logit may go in all steps; from one end to the other is 5
_STRETCH = (-0.1, 1.1)  # of the sigmoid, so that it reaches both of its ends
_WARM = 0.2  # of the steps, before anything is drawn to an end
_SHARPNESS = 20.0, 2.0  # of the pull to the ends, first and last
_PULL = 3.0  # against an error that is one for each weight at the start


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


def learn_rounding(
    weight: torch.Tensor,
    rows: Rows,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
    *,
    iterations: int,
) -> torch.Tensor:
    """The weight of least error in ``rows``, each element at one of the two integers around it.

    (Nagel et al. 2020, AdaRound, arXiv:2004.10568, equations 21 to 25.) Outputs are problems of their own, so each counts in
    units of the error that nearest rounding leaves it; one price of the regulariser then serves all layers.

    Args:
        weight: [groups, outputs, features].
        rows: What to learn on; each step draws some.
        scale: Broadcasts against ``weight``.
        zero_point: Likewise.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        iterations: Steps of Adam.

    Returns:
        The rounded weight, in the unit of ``weight``.
    """
    low, high = _STRETCH
    position = weight / scale
    floor = position.floor()

    def on_grid(part: torch.Tensor) -> torch.Tensor:
        return ((floor + part + zero_point).clamp(quant_min, quant_max) - zero_point) * scale

    start = rows.error(on_grid((position - floor).round()))
    price = torch.where(start > 0, weight.shape[2] / start, 0.0)
    random = torch.Generator().manual_seed(0)
    total = rows.x.shape[1]
    with torch.enable_grad():
        logits = torch.logit((position - floor - low) / (high - low)).requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=_TRAVEL / iterations)
        for step in range(iterations):
            drawn = rows if total <= _ROWS else rows[torch.randint(total, (_ROWS,), generator=random).to(weight.device)]
            part = (torch.sigmoid(logits) * (high - low) + low).clamp(0, 1)
            loss = (drawn.error(on_grid(part)) * price).sum()
            if step >= _WARM * iterations:
                loss = loss + _PULL * (1 - (2 * part - 1).abs() ** _sharpness(step / iterations)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return on_grid((logits.detach() > 0).to(weight))


def _sharpness(done: float) -> float:
    """The exponent of the regulariser once a part ``done`` of the steps is: first it moves only what is near an end."""
    first, last = _SHARPNESS
    return last + (first - last) * (1 + math.cos(math.pi * (done - _WARM) / (1 - _WARM))) / 2
