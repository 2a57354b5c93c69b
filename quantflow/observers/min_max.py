"""Min-max observers: the least and the greatest value over all data."""

from __future__ import annotations

import torch

from quantflow.observers.base import Observer


class MinMaxObserver(Observer):
    """Takes the least and the greatest value over all data.

    The arguments are those of :class:`Observer`.

    Example:
        >>> import torch
        >>> from quantflow.observers import MinMaxObserver
        >>> observer = MinMaxObserver()
        >>> for batch in (torch.tensor([-1.0, 0.5]), torch.tensor([0.0, 2.0])):
        ...     _ = observer(batch)
        >>> observer.min_val, observer.max_val
        (tensor(-1.), tensor(2.))
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel():
            low, high = self.extremes(x)
            self.min_val = torch.minimum(self.min_val, low)
            self.max_val = torch.maximum(self.max_val, high)
        return x


class PerChannelMinMaxObserver(MinMaxObserver):
    """:class:`MinMaxObserver` for per-channel schemes.

    torchao passes ``ch_axis`` only to classes with PerChannel in their name.

    Example:
        >>> import torch
        >>> from quantflow.observers import PerChannelMinMaxObserver
        >>> observer = PerChannelMinMaxObserver(qscheme=torch.per_channel_symmetric, ch_axis=0)
        >>> _ = observer(torch.tensor([[-1.0, 2.0], [-3.0, 4.0]]))
        >>> observer.min_val, observer.max_val
        (tensor([-1., -3.]), tensor([2., 4.]))
    """
