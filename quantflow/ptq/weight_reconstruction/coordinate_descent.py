"""Coordinate descent: improves a rounded weight integer by integer, and its scale with them."""

from __future__ import annotations

import torch

from quantflow.ptq.weight_reconstruction.gptq import BLOCK, output_error

_SWEEPS = 2  # over all features, between two scales


def descend(
    weight: torch.Tensor,
    rounded: torch.Tensor,
    hessian: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
) -> torch.Tensor:
    """Change integers of ``rounded``, one feature after the other, where that lowers the error of the layer's output.

    Each change is the best one, all other integers given (Behdin et al. 2023, QuantEase, arXiv:2309.01885): no output's error
    rises.

    Args:
        weight: What is rounded, [groups, outputs, features], float64.
        rounded: Where to start, on the grid.
        hessian: The damped covariance of the inputs, [groups, features, features], float64.
        scale: Of the grid, [groups, outputs, 1].
        zero_point: Likewise.
        quant_min: Smallest integer.
        quant_max: Largest integer.

    Returns:
        The rounded weight, in the unit of ``weight``.
    """
    levels = torch.round(rounded / scale)  # integers less the zero point
    step, low, high = scale[..., 0], (quant_min - zero_point)[..., 0], (quant_max - zero_point)[..., 0]
    gradient = (levels * scale - weight) @ hessian
    features = weight.shape[2]
    for _ in range(_SWEEPS):
        before = levels.clone()
        for start in range(0, features, BLOCK):
            block = slice(start, min(start + BLOCK, features))
            here, within = gradient[..., block].clone(), hessian[:, block, block]
            for i in range(here.shape[2]):
                now = levels[..., start + i]
                best = torch.round(now - here[..., i] / (within[:, i, i, None] * step)).clamp(low, high)
                here += ((best - now) * step)[..., None] * within[:, i, None]
                levels[..., start + i] = best
            gradient += ((levels - before)[..., block] * scale) @ hessian[:, block]
        if torch.equal(levels, before):
            break
    return levels * scale


def best_scale(weight: torch.Tensor, rounded: torch.Tensor, hessian: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The scale with which the integers of ``rounded`` err least, by least squares; ``scale`` where there is none.

    Args:
        weight: What is rounded, [groups, outputs, features], float64.
        rounded: Its rounding on the grid of ``scale``.
        hessian: The damped covariance of the inputs, [groups, features, features], float64.
        scale: One for each output, [groups, outputs, 1], float64.

    Returns:
        The scale, rounded to float32, in the shape of ``scale``.
    """
    levels = torch.round(rounded / scale)
    weighed = levels @ hessian
    product, square = (weighed * weight).sum(2, keepdim=True), (weighed * levels).sum(2, keepdim=True)
    found = (product / square.clamp(min=torch.finfo(square.dtype).tiny)).float().double()
    usable = (square > 0) & (found > 0.5 * scale) & (found < 2 * scale)
    found = torch.where(usable, found, scale)
    better = output_error(levels * found - weight, hessian) < output_error(levels * scale - weight, hessian)
    return torch.where(better[..., None], found, scale)
