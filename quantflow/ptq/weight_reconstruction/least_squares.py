"""Least squares: the weight that best reproduces a layer's float output from its quantized inputs."""

from __future__ import annotations

from typing import cast

import torch

from quantflow.ptq.weight_reconstruction.moments import Moments

_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_FEW = (1e-2, 1e-1, 1.0, 10.0)
_MANY = 1024  # features from which a solution is slow


def correction(first: Moments, second: Moments) -> torch.Tensor:
    """What to add to a weight, [groups, outputs, features], float64.

    Ridge regression of the residual (float output less that of the weight on the quantized inputs) on those inputs. The
    ridge, relative to the mean variance of a feature, is the one that generalises best from one half of the data to the
    other, for each group; no correction is one of the choices.
    """
    whole = first + second
    folds = [(first, second), (second, first)]
    ridges: tuple[float, ...] = _RIDGES
    if whole.x.shape[1] >= _MANY:
        folds, ridges = folds[:1], _FEW
    by_fold = ([_gain(solve(fit, ridge), held_out) for fit, held_out in folds] for ridge in ridges)
    gains = torch.stack([cast(torch.Tensor, sum(gains)) for gains in by_fold])
    gain, best = gains.min(0)  # [groups]
    found = torch.zeros_like(whole.xr)
    for index, ridge in enumerate(ridges):
        chosen = (best == index) & (gain < 0)
        if chosen.any():
            found[chosen] = solve(whole, ridge)[chosen]
    return found.transpose(1, 2)


def solve(moments: Moments, ridge: float) -> torch.Tensor:
    """The ridge regression of residuals on inputs, [groups, features, outputs]; zero where it has no solution."""
    factor, failed = torch.linalg.cholesky_ex(ridged(moments.covariance, ridge))
    found = torch.cholesky_solve(moments.cross_covariance, factor)
    return torch.where((failed == 0)[:, None, None] & found.isfinite(), found, 0.0)


def ridged(covariance: torch.Tensor, ridge: float) -> torch.Tensor:
    """``covariance`` with ``ridge`` times the mean variance of each group added to its diagonal."""
    variance = covariance.diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-12)
    return covariance + torch.diag_embed((ridge * variance)[:, None].expand(covariance.shape[:2]))


def _gain(found: torch.Tensor, held_out: Moments) -> torch.Tensor:
    """The change of the squared error on other data, [groups]; negative is better."""
    return ((found * (held_out.covariance @ found)) - 2 * found * held_out.cross_covariance).sum((1, 2))
