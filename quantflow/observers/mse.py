"""Ranges that minimise the squared rounding error, clipping outliers where that pays."""

from __future__ import annotations

from typing import Any

import torch

from quantflow.observers.min_max import MinMaxObserver
from quantflow.qparams import choose_qparams, quantize

_PER_BATCH = 2048
_BATCHES = 16
_BINS = 8192
_SHRINK = torch.linspace(1.0, 0.2, 65)


class MSEObserver(MinMaxObserver):
    """The clipping range with the least mean squared error of quantization, over a bounded sample of the data.

    The extremes are exact, over all data; between them and a fifth of them, the two ends are searched, first together and
    then each alone (Choukroun et al. 2019, arXiv:1902.06822, search for it likewise). The sample is a reservoir of
    batches, at most 16 of 2,048 values each, so that memory does not grow with the data; a smaller batch counts whole, and
    of few data the extremes count besides. The search sees the sample as a histogram of the means of 8,192 bins.
    """

    sample: torch.Tensor
    count: torch.Tensor
    resized = (*MinMaxObserver.resized, "sample")

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.reset()

    def reset(self) -> None:
        """Forget what was seen."""
        super().reset()
        self.register_buffer("sample", torch.empty(0, _PER_BATCH, device=self.min_val.device))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # values seen
        self._batches = 0
        self._random = torch.Generator().manual_seed(0)  # the same data give the same range
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x
        super().forward(x)
        self._found = None
        self._batches += 1
        self.count += x.numel()
        place = self._batches - 1
        if place >= _BATCHES:  # reservoir sampling: each batch is as likely to stay as any other
            place = int(torch.randint(self._batches, (), generator=self._random))
        if place < _BATCHES:
            row = x.detach().reshape(-1)[self._pick(x.numel()).to(x.device)].float()[None]
            if self.matters is not None:
                row = row.clamp(*self.matters)
            self.sample = torch.cat([self.sample[:place], row, self.sample[place + 1 :]])
        return x

    def _pick(self, size: int) -> torch.Tensor:
        """Which of ``size`` values to keep: all of few, so that no tail is missed; some of many."""
        if size <= _PER_BATCH:
            return torch.arange(_PER_BATCH) % size
        if size <= 8 * _PER_BATCH:
            return torch.randperm(size, generator=self._random)[:_PER_BATCH]
        return torch.randint(size, (_PER_BATCH,), generator=self._random)

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (float32) and zero point (int32), scalars."""
        if not len(self.sample):
            return super().calculate_qparams()
        if self._found is None:
            self._found = self._search()
        return self._found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._batches, self._found = len(self.sample), None

    def _search(self) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = _binned(self.sample.flatten())
        ends = torch.stack([self.min_val, self.max_val])
        few = bool(self.count <= _PER_BATCH * _BATCHES)
        shrink = _SHRINK.to(x.device)
        one = torch.ones_like(shrink)
        low, high = self.min_val.clamp(max=0.0), self.max_val.clamp(min=0.0)
        for low_factors, high_factors in ((shrink, shrink), (shrink, one), (one, shrink)):
            lows, highs = low * low_factors, high * high_factors
            error = self._error(x, lows, highs) @ weight
            if few:  # two values of them that the sample may lack
                error = error + self._error(ends, lows, highs).sum(1) / self.count
            best = error.argmin()
            low, high = lows[best], highs[best]
        return self._qparams(low, high)

    def _error(self, x: torch.Tensor, lows: torch.Tensor, highs: torch.Tensor) -> torch.Tensor:
        """The squared error of each value of ``x`` for each candidate range, [candidates, values]."""
        scale, zero_point = (q[:, None] for q in self._qparams(lows, highs))
        integers = quantize(x[None], scale, zero_point, self.quant_min, self.quant_max)
        return ((integers - zero_point) * scale - x).square()

    def _qparams(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return choose_qparams(
            low,
            high,
            quant_min=self.quant_min,
            quant_max=self.quant_max,
            symmetric=self.symmetric,
            eps=self.eps,
        )


def _binned(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The means of the bins that values of ``x`` fall into, and the share of each."""
    if x.numel() <= _BINS:
        return x, torch.full_like(x, 1 / x.numel())
    low, high = x.aminmax()
    width = ((high - low) / _BINS).clamp(min=torch.finfo(x.dtype).tiny)
    place = ((x - low) / width).long().clamp(0, _BINS - 1)
    count = torch.bincount(place, minlength=_BINS)
    mean = torch.bincount(place, weights=x.double(), minlength=_BINS) / count
    filled = count > 0
    return mean[filled].to(x.dtype), (count[filled] / x.numel()).to(x.dtype)
