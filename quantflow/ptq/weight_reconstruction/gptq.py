"""GPTQ: rounds weights feature by feature; the remaining features compensate each rounding error."""

from __future__ import annotations

import torch

from quantflow.ptq.weight_reconstruction.least_squares import ridged

_BLOCK = 128
_DAMPING = 0.01


def round_weights(
    weight: torch.Tensor,
    covariance: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    quant_min: int,
    quant_max: int,
) -> torch.Tensor:
    """Round ``weight`` with a small error of the layer's output, by GPTQ (Frantar et al. 2023, arXiv:2210.17323).

    Features are processed by decreasing variance; the damping is the paper's 1 %. An output keeps nearest rounding if that has
    the smaller error.

    Args:
        weight: [groups, outputs, features], float64.
        covariance: Of the inputs, [groups, features, features], float64.
        scale: Broadcasts against ``weight``.
        zero_point: Likewise.
        quant_min: Smallest integer.
        quant_max: Largest integer.

    Returns:
        The rounded weight, in the unit of ``weight``.
    """
    hessian = ridged(covariance, _DAMPING)
    order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
    rows = order[:, None].expand_as(weight)
    ordered = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(ordered)[0])
    factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
    scale, zero_point = (q.expand(*weight.shape[:2], 1) for q in (scale, zero_point))

    def nearest(w: torch.Tensor) -> torch.Tensor:
        return ((torch.round(w / scale) + zero_point).clamp(quant_min, quant_max) - zero_point) * scale

    left = weight.gather(2, rows).clone()
    rounded = torch.empty_like(left)
    features = weight.shape[2]
    for start in range(0, features, _BLOCK):
        end = min(start + _BLOCK, features)
        errors = torch.zeros_like(left[:, :, start:end])
        for i in range(start, end):
            w = left[:, :, i : i + 1]
            rounded[:, :, i : i + 1] = nearest(w)
            error = (w - rounded[:, :, i : i + 1]) / factor[:, i, i, None, None]
            left[:, :, i:end] -= error * factor[:, i : i + 1, i:end]
            errors[:, :, i - start : i - start + 1] = error
        left[:, :, end:] -= errors @ factor[:, start:end, end:]
    found = torch.empty_like(rounded).scatter_(2, rows, rounded)
    plain = nearest(weight)
    better = output_error(found - weight, covariance) <= output_error(plain - weight, covariance)  # false for no number
    return torch.where((better & (failed == 0)[:, None])[..., None], found, plain)


def output_error(difference: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """The mean squared error of each output for a ``difference`` of weights, [groups, outputs]."""
    return ((difference @ covariance) * difference).sum(2)
