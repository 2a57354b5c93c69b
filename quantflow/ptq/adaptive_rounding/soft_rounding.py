"""Soft rounding: weights between their two nearest integers, and the gradient descent that decides for one of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule

from quantflow.graph.aten import node_argument
from quantflow.observers.observation import affine, qparams_of
from quantflow.ptq.writing import by_output
from quantflow.simulation.float_weights import attribute
from quantflow.simulation.quantized_layers import Layer

_TRAVEL = 20.0  # the sum of all learning rates; logits are 5 apart
_STRETCH = (-0.1, 1.1)  # of the sigmoid, so that it reaches 0 and 1
_WARM = 0.2  # fraction of the steps before the regulariser begins
_SHARPNESS = 20.0, 2.0  # exponent of the regulariser, first and last
_PULL = 3.0  # weight of the regulariser; the error is one per weight with nearest rounding
_ON_GRID = 1e-3  # steps


class SoftRounding:
    """A weight with a learned rounding (Nagel et al. 2020, AdaRound, arXiv:2004.10568, equations 23 to 25).

    Args:
        weight: [groups, outputs, features].
        scale: Broadcasts against ``weight``.
        zero_point: Likewise.
        quant_min: Smallest integer.
        quant_max: Largest integer.
    """

    def __init__(
        self, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int
    ) -> None:
        self.weight, self.scale, self.zero_point = weight, scale, zero_point
        self.limits = quant_min, quant_max
        position = weight / scale
        self.floor = position.floor()
        low, high = _STRETCH
        self.logits = torch.logit((position - self.floor - low) / (high - low)).requires_grad_()

    @classmethod
    def of(cls, graph: GraphModule, layer: Layer) -> SoftRounding:
        """The weight of ``layer`` in ``graph``, with the quantization parameters of its observer."""
        weight = attribute(graph, node_argument(layer.weight))
        scale, zero_point = (
            by_output(q.to(weight.device), layer, weight).to(weight) for q in qparams_of(layer.observer)
        )
        limits = (affine(layer.observer).quant_min, affine(layer.observer).quant_max)
        return cls(layer.matrices(weight), scale, zero_point, *limits)

    def between(self, part: torch.Tensor) -> torch.Tensor:
        """The weight that is ``part`` of the way from the lower integers to the upper ones, in the unit of the weight."""
        return ((self.floor + part + self.zero_point).clamp(*self.limits) - self.zero_point) * self.scale

    def nearest(self) -> torch.Tensor:
        """The weight rounded to the nearest."""
        return self.between((self.weight / self.scale - self.floor).round())

    def is_fixed(self, nearest: torch.Tensor) -> bool:
        """Whether the weight is quantized exactly already, so that there is nothing to learn."""
        return bool(((self.weight - nearest) / self.scale).abs().max() < _ON_GRID)

    def part(self) -> torch.Tensor:
        """The position of each weight between its two integers, 0 to 1, with a gradient."""
        low, high = _STRETCH
        return (torch.sigmoid(self.logits) * (high - low) + low).clamp(0, 1)

    def rounded(self) -> torch.Tensor:
        """The weight, each element at the nearer of its two integers."""
        return self.between((self.logits.detach() > 0).to(self.weight))


def descend(
    roundings: Sequence[SoftRounding], error: Callable[[list[torch.Tensor]], torch.Tensor], iterations: int
) -> list[torch.Tensor]:
    """Learn all ``roundings`` at once by Adam.

    Args:
        roundings: What to learn, in place.
        error: The loss of soft weights, in the order of ``roundings``, a scalar; called once per step. It should be
            proportional to the number of weights, and relative to the error of nearest rounding.
        iterations: Steps.

    Returns:
        The rounded weights.
    """
    with torch.enable_grad():
        optimizer = torch.optim.Adam([r.logits for r in roundings], lr=_TRAVEL / iterations)
        for step in range(iterations):
            parts = [r.part() for r in roundings]
            loss = error([r.between(part) for r, part in zip(roundings, parts, strict=True)])
            if step >= _WARM * iterations:
                sharpness = _sharpness(step / iterations)
                loss = loss + _PULL * sum((1 - (2 * part - 1).abs() ** sharpness).sum() for part in parts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return [r.rounded() for r in roundings]


def _sharpness(done: float) -> float:
    """The exponent of the regulariser after the fraction ``done`` of the steps. It first moves only weights near an integer."""
    first, last = _SHARPNESS
    return last + (first - last) * (1 + math.cos(math.pi * (done - _WARM) / (1 - _WARM))) / 2
