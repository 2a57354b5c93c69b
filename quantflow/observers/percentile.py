"""Percentile observers: ranges that exclude a fixed share of the values at either end."""

from __future__ import annotations

from typing import Any

import torch

from quantflow.errors import QuantflowError
from quantflow.observers.sampled import SampledObserver


class PercentileObserver(SampledObserver):
    """Takes the ``100 - percentile`` to the ``percentile`` percentile of the sample (McKinstry et al. 2019, arXiv:1809.04191).

    It is simple, and robust against outliers that do not matter. It clips as many values where outliers matter.

    Args:
        percentile: In (50, 100]; 100 takes the exact extremes.
        spec: The arguments of :class:`Observer`, by name.

    Raises:
        QuantflowError: at stage ``"prepare"``, when ``percentile`` is out of range.

    Example:
        >>> import torch
        >>> from quantflow.observers import MinMaxObserver, PercentileObserver
        >>> x = torch.cat([torch.linspace(-1, 1, 2000), torch.tensor([3.0])])
        >>> percentile, min_max = PercentileObserver(99.0), MinMaxObserver()
        >>> _ = percentile(x), min_max(x)
        >>> bool(percentile.calculate_qparams()[0] < min_max.calculate_qparams()[0])
        True
    """

    def __init__(self, percentile: float = 99.99, **spec: Any) -> None:
        super().__init__(**spec)
        if not 50 < percentile <= 100:
            reason = f"{percentile} does not lie in (50, 100]"
            raise QuantflowError("prepare", reason, node="percentile", remedy="99.9 to 99.999; 100 for min-max")
        self.percentile = percentile

    def choose_range(
        self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the percentiles of each channel."""
        if self.percentile == 100:
            return low, high
        share = 1 - self.percentile / 100
        ordered = values.sort(1).values
        last = ordered.shape[1] - 1
        return ordered[:, round(share * last)], ordered[:, round((1 - share) * last)]


class PerChannelPercentileObserver(PercentileObserver):
    """:class:`PercentileObserver` for per-channel schemes.

    torchao passes ``ch_axis`` only to classes with PerChannel in their name.

    Example:
        >>> import torch
        >>> from quantflow.observers import PerChannelPercentileObserver
        >>> observer = PerChannelPercentileObserver(qscheme=torch.per_channel_symmetric, ch_axis=0)
        >>> _ = observer(torch.randn(4, 100))
        >>> tuple(observer.calculate_qparams()[0].shape)
        (4,)
    """
