"""MSE observers: clipping ranges that minimize the mean squared quantization error."""

from __future__ import annotations

import torch

from quantflow.observers.sampled import SampledObserver
from quantflow.qparams.qparams import quantize

_BINS = 8192
_SHRINK = torch.linspace(1.0, 0.2, 65)
_AT_ONCE = 2**24  # values in one step of the search, which bounds its memory


class MSEObserver(SampledObserver):
    """Takes the clipping range with the least mean squared error of quantization over the sample.

    The two ends are searched between the extremes and a fifth of them, first together and then each alone (Choukroun et al.
    2019, arXiv:1902.06822, search for it likewise). Of few data the extremes count besides the sample. This range is best for
    the tensor itself; :func:`quantflow.recover` finds what is best for the network's output.

    Args:
        spec: The arguments of :class:`Observer`, by name.

    Example:
        >>> import torch
        >>> from quantflow.observers import MinMaxObserver, MSEObserver
        >>> x = torch.cat([torch.linspace(-1, 1, 2000), torch.tensor([3.0])])
        >>> mse, min_max = MSEObserver(quant_min=-8, quant_max=7), MinMaxObserver(quant_min=-8, quant_max=7)
        >>> _ = mse(x), min_max(x)
        >>> bool(mse.calculate_qparams()[0] < min_max.calculate_qparams()[0])
        True
    """

    def choose_range(
        self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range with the least squared error of each channel."""
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
            if few:  # the extremes themselves, which the sample may lack
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
    """The values of one channel as the means of 8,192 bins, and the share of values in each bin."""
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
    """:class:`MSEObserver` for per-channel schemes.

    torchao passes ``ch_axis`` only to classes with PerChannel in their name.

    Example:
        >>> import torch
        >>> from quantflow.observers import PerChannelMSEObserver
        >>> observer = PerChannelMSEObserver(qscheme=torch.per_channel_symmetric, ch_axis=0)
        >>> _ = observer(torch.randn(4, 100))
        >>> tuple(observer.calculate_qparams()[0].shape)
        (4,)
    """
