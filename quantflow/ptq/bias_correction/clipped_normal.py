"""The moments of a normal variable that passed a clamp."""

from __future__ import annotations

import math

import torch

_FAR = 40.0  # standard deviations


def clipped_normal(mean: torch.Tensor, std: torch.Tensor, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of ``x.clamp(low, high)`` for normal ``x`` (Nagel et al. 2019, arXiv:1906.04721, appendix C).

    Args:
        mean: Of ``x``, float64.
        std: Of ``x``, the same shape, not negative.
        low: Lower limit, may be ``-inf``.
        high: Upper limit, may be ``inf``.
    """
    std = std.clamp(min=1e-12)
    reach = _FAR * std + 1
    a = torch.full_like(mean, low) if math.isfinite(low) else torch.minimum(mean, mean.new_tensor(high)) - reach
    b = torch.full_like(mean, high) if math.isfinite(high) else torch.maximum(mean, a) + reach
    alpha, beta = (a - mean) / std, (b - mean) / std
    below, above = torch.special.ndtr(alpha), torch.special.ndtr(-beta)
    inside = 1 - below - above
    first, last = (torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi) for z in (alpha, beta))
    found = a * below + b * above + mean * inside + std * (first - last)
    square = a**2 * below + b**2 * above + (mean**2 + std**2) * inside
    square = square + std * ((mean + a) * first - (mean + b) * last)
    return found, (square - found**2).clamp(min=0).sqrt()
