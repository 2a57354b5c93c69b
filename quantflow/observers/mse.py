"""Ranges that minimise the squared rounding error, clipping outliers where that pays."""

from __future__ import annotations

import torch

from quantflow.observers.sampled import SampledObserver
from quantflow.qparams.qparams import quantize

_BINS = 8192
_SHRINK = torch.linspace(1.0, 0.2, 65)
_AT_ONCE = 2**24  # values in one step of the search


class MSEObserver(SampledObserver):
    """The clipping range with the least mean squared error of quantization over the sample.

    Between the extremes and a fifth of them the two ends are searched, first together and then each alone (Choukroun et al.
    2019, arXiv:1902.06822, search for it likewise). Of few data the extremes count besides the sample. Best for the tensor
    itself; what is best for the network's output, :func:`quantflow.recover` finds.
    """

    def choose_range(
        self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The range with the least squared error, for each channel."""
        most = max(1, _AT_ONCE // (len(_SHRINK) * min(values.shape[1], _BINS)))
        parts = zip(values.split(most), low.split(most), high.split(most), strict=True)
        found = [self._search(*part) for part in parts]
        return torch.cat([part[0] for part in found]), torch.cat([part[1] for part in found])

    def _search(
        self, values: torch.Tensor, smallest: torch.Tensor, largest: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = _binned(values)
        ends = torch.stack([smallest, largest], 1)
        few = bool(self.count <= self.sample[:, 0].numel())
        shrink = _SHRINK.to(x.device)[:, None]
        one = torch.ones_like(shrink)
        low, high = smallest.clamp(max=0.0), largest.clamp(min=0.0)
        for low_factors, high_factors in ((shrink, shrink), (shrink, one), (one, shrink)):
            lows, highs = low * low_factors, high * high_factors  # [candidates, channels]
            error = (self._error(x, lows, highs) * weight).sum(-1)
            if few:  # two values of them that the sample may lack
                error = error + self._error(ends, lows, highs).sum(-1) / self.count
            best = error.argmin(0)[None]
            low, high = lows.gather(0, best)[0], highs.gather(0, best)[0]
        return low, high

    def _error(self, x: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
        """The squared error of each value of ``x`` for each candidate range, [candidates, channels, values]."""
        scale, zero_point = (q[..., None] for q in self.grid(lows, highs))
        integers = quantize(x[None], scale, zero_point, self.quant_min, self.quant_max)
        return ((integers - zero_point) * scale - x).square()


def _binned(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One channel's values as the means of the 8,192 bins that they fall into, with the share of each."""
    if values.shape[0] > 1 or values.shape[1] <= _BINS:
        return values, torch.full_like(values[:, :1], 1 / values.shape[1])
    x = values[0]
    low, high = x.aminmax()
    width = ((high - low) / _BINS).clamp(min=torch.finfo(x.dtype).tiny)
    place = ((x - low) / width).long().clamp(0, _BINS - 1)
    count = torch.bincount(place, minlength=_BINS)
    mean = torch.bincount(place, weights=x.double(), minlength=_BINS) / count
    filled = count > 0
    return mean[filled].to(x.dtype)[None], (count[filled] / x.numel()).to(x.dtype)[None]


class PerChannelMSEObserver(MSEObserver):
    """The same for per-channel schemes (torchao hands ``ch_axis`` only to classes named so)."""
