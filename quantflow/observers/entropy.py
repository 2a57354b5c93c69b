"""Entropy observers: ranges of least Kullback-Leibler divergence between the float and the quantized distribution."""

from __future__ import annotations

import torch

from quantflow.observers.sampled import SampledObserver

_BINS = 2048
_SHRINK = torch.linspace(1.0, 0.1, 91)


class EntropyObserver(SampledObserver):
    """Takes the range whose quantized distribution has the least Kullback-Leibler divergence from that of the sample.

    The method is that of TensorRT (Migacz 2017, "8-bit inference with TensorRT", GTC): values outside a candidate range fall
    into its last bins, and the bins of one integer share its probability evenly. It is made for activations with long tails;
    of few values the histogram is poor.

    Args:
        spec: The arguments of :class:`Observer`, by name.

    Example:
        >>> import torch
        >>> from quantflow.observers import EntropyObserver, MinMaxObserver
        >>> x = torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([1.5])])
        >>> entropy, min_max = EntropyObserver(), MinMaxObserver()
        >>> _ = entropy(x), min_max(x)
        >>> bool(entropy.calculate_qparams()[0] < min_max.calculate_qparams()[0])
        True
    """

    def choose_range(
        self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range of least divergence of each channel."""
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        width = ((high - low) / _BINS).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        place = ((values - low[:, None]) / width).long().clamp(0, _BINS - 1)
        counts = torch.zeros(len(values), _BINS, device=values.device)
        counts.scatter_add_(1, place, torch.ones_like(values))
        centres = low[:, None] + (torch.arange(_BINS, device=values.device) + 0.5) * width
        shrink = _SHRINK.to(low)[:, None]
        for lows, highs in ((low * shrink, None), (None, high * shrink)):  # each end alone
            lows = low.expand(len(shrink), -1) if lows is None else lows
            highs = high.expand(len(shrink), -1) if highs is None else highs
            pairs = zip(lows, highs, strict=True)
            best = torch.stack([self._divergence(counts, centres, *ends) for ends in pairs]).argmin(0)[None]
            low, high = lows.gather(0, best)[0], highs.gather(0, best)[0]
        return low, high

    def _divergence(
        self, counts: torch.Tensor, centres: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> torch.Tensor:
        scale, zero_point = (q[:, None] for q in self.grid(low, high))
        inside = (centres >= low[:, None]) & (centres <= high[:, None])
        nearest = torch.round(centres / scale).add(zero_point).clamp(self.quant_min, self.quant_max)
        level = (nearest - self.quant_min).long()
        levels = self.quant_max - self.quant_min + 1

        def by_level(x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), levels, device=x.device).scatter_add_(1, level, x)

        # The reference counts clipped values in its end bins; the quantized distribution is that of the values inside.
        first, last = inside.int().argmax(1), _BINS - 1 - inside.flip(1).int().argmax(1)
        edge = torch.where(centres < low[:, None], first[:, None], last[:, None])
        everywhere = torch.arange(_BINS, device=counts.device).expand_as(counts)
        reference = torch.zeros_like(counts).scatter_add_(1, torch.where(inside, everywhere, edge), counts)
        filled = (inside & (counts > 0)).float()
        share = by_level(counts * inside) / by_level(filled).clamp(min=1.0)
        quantized = share.gather(1, level) * filled
        p = reference / reference.sum(1, keepdim=True)
        q = quantized / quantized.sum(1, keepdim=True).clamp(min=1e-12)
        return torch.where(p > 0, p * (p.clamp(min=1e-12) / q.clamp(min=1e-12)).log(), 0.0).sum(1)


class PerChannelEntropyObserver(EntropyObserver):
    """:class:`EntropyObserver` for per-channel schemes.

    torchao passes ``ch_axis`` only to classes with PerChannel in their name.

    Example:
        >>> import torch
        >>> from quantflow.observers import PerChannelEntropyObserver
        >>> observer = PerChannelEntropyObserver(qscheme=torch.per_channel_symmetric, ch_axis=0)
        >>> _ = observer(torch.randn(4, 100))
        >>> tuple(observer.calculate_qparams()[0].shape)
        (4,)
    """
