"""Rounding of a fitted weight: its scale, GPTQ, and coordinate descent."""

from __future__ import annotations

import torch

from quantflow.observers.observation import affine, qparams_of_range
from quantflow.ptq.weight_reconstruction.coordinate_descent import best_scale, descend
from quantflow.ptq.weight_reconstruction.gptq import GPTQ, damped, nearest, output_error
from quantflow.ptq.writing import QParams, by_output
from quantflow.qparams.qparams import PER_CHANNEL
from quantflow.simulation.quantized_layers import Layer

_SHRINK = torch.linspace(1.0, 0.5, 21, dtype=torch.float64)
_AROUND = (1.08, 1.0, 0.92, 0.84)  # GPTQ compensates for some clipping: its best range is near that of nearest rounding
_FINE = 64  # levels from which a smaller weight range does not help
_ROUNDS = 2  # of integers and scales in turn


def round_fitted(
    layer: Layer, fitted: torch.Tensor, covariance: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, QParams]:
    """Round ``fitted`` so that the layer's output errs little: to the grid of its extremes or, with few levels, to the best.

    Args:
        layer: The layer; its observer tells integers and granularity.
        fitted: [groups, outputs, features], float64.
        covariance: Of the inputs, [groups, features, features], float64.
        weight: The layer's weight, which tells the shape of the scale.

    Returns:
        The rounded weight, and its scale and zero point.
    """
    observer = affine(layer.observer)
    limits = observer.quant_min, observer.quant_max
    per_channel = observer.qscheme in PER_CHANNEL
    few = limits[1] - limits[0] < _FINE
    by_channel = fitted.reshape(weight.shape[0], -1) if per_channel else fitted.reshape(1, -1)
    low, high = by_channel.amin(1), by_channel.amax(1)

    def spread(by_row: torch.Tensor) -> torch.Tensor:
        """One number a channel, or one for the tensor, as [groups, outputs, 1]."""
        return by_output(by_row if per_channel else by_row[0], layer, weight)

    def grid(shrink: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale, zero_point = map(spread, qparams_of_range(observer, low * shrink, high * shrink))
        return scale, zero_point

    def error(rounded: torch.Tensor) -> torch.Tensor:
        by_channel = output_error(rounded - fitted, covariance).reshape(-1)
        return by_channel if per_channel else by_channel.sum()[None]

    shrink = torch.ones_like(low)
    if few:
        errors = torch.stack([error(nearest(fitted, *grid(factor * shrink), *limits)) for factor in _SHRINK])
        shrink = _SHRINK.to(low)[errors.argmin(0)]
    hessian = damped(covariance)
    gptq = GPTQ(covariance, hessian)
    first, *others = _AROUND if few else (1.0,)
    scale, zero_point = grid(shrink * first)
    rounded = gptq.round(fitted, scale, zero_point, *limits)
    least = error(rounded)
    for around in others:
        candidate = grid(shrink * around)
        other = gptq.round(fitted, *candidate, *limits)
        found = error(other)
        better = spread(found < least) > 0
        pairs = zip((*candidate, other), (scale, zero_point, rounded), strict=True)
        scale, zero_point, rounded = (torch.where(better, new, old) for new, old in pairs)
        least = torch.minimum(found, least)
    for _ in range(_ROUNDS if few and per_channel else 0):
        rounded = descend(fitted, rounded, hessian, scale, zero_point, *limits)
        fine = best_scale(fitted, rounded, hessian, scale)
        rounded, scale = torch.round(rounded / scale) * fine, fine
    rounded = descend(fitted, rounded, hessian, scale, zero_point, *limits)
    if per_channel:
        return rounded, (scale.flatten().float(), zero_point.flatten().to(torch.int32))
    return rounded, (scale[0, 0, 0].float(), zero_point[0, 0, 0].to(torch.int32))
