"""Weighted first and second moments of a layer's inputs and errors, accumulated batch by batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class Moments:
    """Sums over rows, relative to a fixed shift against cancellation with large means; float64.

    Attributes:
        shift: Subtracted from the inputs, [groups, 1, features].
        weight: Sum of the rows' weights, [groups].
        x: Inputs, [groups, features].
        r: Residuals, [groups, outputs].
        xx: Inputs by inputs, [groups, features, features].
        xr: Inputs by residuals, [groups, features, outputs].
    """

    shift: torch.Tensor
    weight: torch.Tensor
    x: torch.Tensor
    r: torch.Tensor
    xx: torch.Tensor
    xr: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, r: torch.Tensor, weights: torch.Tensor, shift: torch.Tensor) -> Moments:
        """Of the rows ``x`` [groups, rows, features] and ``r`` [groups, rows, outputs] with ``weights`` [groups, rows]."""
        root = weights.sqrt()[..., None]
        # The products are faster on contiguous tensors.
        x = torch.sub(x, shift, out=x.new_empty(x.shape)).mul_(root)
        r = torch.mul(r, root, out=r.new_empty(r.shape))
        ones, xt = root.transpose(1, 2), x.transpose(1, 2)
        sums = ((ones @ x)[:, 0], (ones @ r)[:, 0], xt @ x, xt @ r)
        return cls(shift, weights.double().sum(1), *(t.double() for t in sums))

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.shift,
            self.weight + other.weight,
            self.x + other.x,
            self.r + other.r,
            self.xx + other.xx,
            self.xr + other.xr,
        )

    @property
    def mean_x(self) -> torch.Tensor:
        """The mean input, [groups, 1, features]."""
        return self._per_weight(self.x)[:, None] + self.shift

    @property
    def mean_r(self) -> torch.Tensor:
        """The mean residual, [groups, 1, outputs]."""
        return self._per_weight(self.r)[:, None]

    @property
    def covariance(self) -> torch.Tensor:
        """Of the inputs, [groups, features, features]."""
        mean = self._per_weight(self.x)
        return self._per_weight(self.xx) - mean[:, :, None] * mean[:, None]

    @property
    def cross_covariance(self) -> torch.Tensor:
        """Of inputs and residuals, [groups, features, outputs]."""
        return self._per_weight(self.xr) - self._per_weight(self.x)[:, :, None] * self.mean_r

    def _per_weight(self, total: torch.Tensor) -> torch.Tensor:
        return total / self.weight.clamp(min=1e-30).reshape(-1, *[1] * (total.ndim - 1))
