"""GPTQ (Frantar et al. 2023, arXiv:2210.17323): weights are rounded feature by feature; the remaining ones compensate."""

from __future__ import annotations

import torch

from quantflow.ptq.weight_reconstruction.least_squares import ridged

BLOCK = 128  # features that are processed one by one before the others are updated
_DAMPING = 0.1


class GPTQ:
    """Rounding of weights for inputs of one ``covariance``, [groups, features, features], float64.

    Features are processed by decreasing variance.

    Args:
        covariance: Of the inputs.
        hessian: :func:`damped` of it.
    """

    def __init__(self, covariance: torch.Tensor, hessian: torch.Tensor) -> None:
        self._covariance = covariance
        self._order = hessian.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True)
        columns = self._order[:, None].expand_as(hessian)
        ordered = hessian.gather(1, self._order[:, :, None].expand_as(hessian)).gather(2, columns)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky_ex(ordered)[0])
        self._factor, self._failed = torch.linalg.cholesky_ex(inverse, upper=True)

    def round(
        self, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int
    ) -> torch.Tensor:
        """Round ``weight`` with a small error of the layer's output; an output keeps nearest rounding if that errs less.

        Args:
            weight: [groups, outputs, features], float64.
            scale: Broadcasts against ``weight``.
            zero_point: Likewise.
            quant_min: Smallest integer.
            quant_max: Largest integer.

        Returns:
            The rounded weight, in the unit of ``weight``.
        """
        rows = self._order[:, None].expand_as(weight)
        scale, zero_point = (q.expand(*weight.shape[:2], 1) for q in (scale, zero_point))
        grid = scale, zero_point, quant_min, quant_max
        factor = self._factor
        left = weight.gather(2, rows).clone()
        rounded = torch.empty_like(left)
        features = weight.shape[2]
        for start in range(0, features, BLOCK):
            end = min(start + BLOCK, features)
            errors = torch.zeros_like(left[:, :, start:end])
            for i in range(start, end):
                w = left[:, :, i : i + 1]
                rounded[:, :, i : i + 1] = nearest(w, *grid)
                error = (w - rounded[:, :, i : i + 1]) / factor[:, i, i, None, None]
                left[:, :, i:end] -= error * factor[:, i : i + 1, i:end]
                errors[:, :, i - start : i - start + 1] = error
            left[:, :, end:] -= errors @ factor[:, start:end, end:]
        found = torch.empty_like(rounded).scatter_(2, rows, rounded)
        plain = nearest(weight, *grid)
        found_error, plain_error = (output_error(w - weight, self._covariance) for w in (found, plain))
        better = found_error <= plain_error  # false for no number
        return torch.where((better & (self._failed == 0)[:, None])[..., None], found, plain)


def damped(covariance: torch.Tensor) -> torch.Tensor:
    """``covariance`` as rounding weighs errors by it: with 10 % on its diagonal.

    The paper adds 1 %. What compensates an error on the sample alone is of no use.
    """
    return ridged(covariance, _DAMPING)


def nearest(
    weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int
) -> torch.Tensor:
    """``weight`` rounded to the nearest point of the grid, float64."""
    return ((torch.round(weight / scale) + zero_point).clamp(quant_min, quant_max) - zero_point) * scale


def output_error(difference: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """The mean squared error of each output for a ``difference`` of weights, [groups, outputs]."""
    return ((difference @ covariance) * difference).sum(2)
