"""Moving average observers: averages of the extremes of each batch, for ranges that follow training."""

from __future__ import annotations

import math
from typing import Any

import torch

from quantflow.distributed import grouped, total, widest
from quantflow.observers.base import Observer


class MovingAverageMinMaxObserver(Observer):
    """Takes the moving average of each batch's extremes (Jacob et al. 2018, arXiv:1712.05877, section 3.1).

    The first batches count alike, so that the average does not depend on the first one most: the newest of ``n`` has the weight
    ``1 / n``, and from ``1 / averaging_constant`` batches on the average is exponential.

    Args:
        averaging_constant: Weight of the newest batch among many; 1 takes the newest alone.
        spec: The arguments of :class:`Observer`, by name.

    Attributes:
        count: How many batches were seen, int64.

    Example:
        >>> import torch
        >>> from quantflow.observers import MovingAverageMinMaxObserver
        >>> observer = MovingAverageMinMaxObserver(averaging_constant=0.01)
        >>> for batch in (torch.tensor([-1.0, 1.0]), torch.tensor([-3.0, 3.0])):
        ...     _ = observer(batch)
        >>> observer.min_val, observer.max_val
        (tensor(-2.), tensor(2.))
    """

    count: torch.Tensor

    def __init__(self, averaging_constant: float = 0.01, **spec: Any) -> None:
        super().__init__(**spec)
        self.averaging_constant = averaging_constant
        self._common: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # range and count
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def reset(self) -> None:
        """Clear the observed range."""
        super().reset()
        self.count = torch.zeros_like(self.count)
        self._common = None

    def start_from(self, low: torch.Tensor, high: torch.Tensor) -> None:
        """Take a range as that of many batches: the next ones change it little."""
        super().start_from(low, high)
        self.count = torch.full_like(self.count, math.ceil(1 / self.averaging_constant))
        self._common = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.numel():
            self.min_val, self.max_val = self._followed(*self.extremes(x))
            self.count = self.count + 1
        return x

    def observe_together(self, x: torch.Tensor) -> None:
        """Follow the extremes of the tensors of all processes, which count as one batch."""
        if not grouped():
            self(x)
            return
        low, high = self.extremes(x) if x.numel() else self._nothing(x)
        low, high = widest(low, high)  # a process without values takes part too: the others wait for it
        some = ~(low > high)
        followed = zip(self._followed(low, high), (self.min_val, self.max_val), strict=True)
        self.min_val, self.max_val = (torch.where(some, new, old) for new, old in followed)
        self.count = self.count + some.any()

    def hold_in_common(self) -> None:
        """Mark the current statistics as common to all processes."""
        self._common = (self.min_val, self.max_val, self.count) if self.count else None

    def synchronize(self) -> None:
        """Take the average over the batches of all processes, the same in each; those held in common before count once."""
        if not grouped():
            return
        ends = torch.stack([self.min_val, self.max_val]).double()
        known, before = torch.zeros_like(ends), torch.zeros_like(self.count)
        if self._common is not None:
            *range_, before = (t.to(ends.device) for t in self._common)
            known = torch.stack(range_).double()
        batches = total((self.count - before).double())
        left = self._left(before, self.count)
        own = torch.where(self.count > before, (ends - left * known) / (1 - left), 0.0)
        share = (self.count - before) / batches.clamp(min=1)
        found = total(torch.where(share > 0, own * share, 0.0))
        count = before + batches.to(self.count.dtype)
        left = self._left(before, count)
        low, high = (left * known + (1 - left) * found).float()
        self.min_val, self.max_val = (
            torch.where(batches > 0, new, old) for new, old in ((low, self.min_val), (high, self.max_val))
        )
        self.count = count
        self.hold_in_common()

    def _left(self, before: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        """The weight that the first ``before`` batches have after ``count`` batches."""
        first = math.floor(1 / self.averaging_constant)  # this many batches have equal weights
        alike = before.clamp(max=first) / count.clamp(min=1, max=first)
        return alike.double() * (1 - self.averaging_constant) ** (
            (count - before.clamp(min=first)).clamp(min=0).double()
        )

    def _followed(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The range after a batch with these extremes."""
        if self.averaging_constant == 1.0:
            return low, high
        weight = (1 / (self.count + 1)).clamp(min=self.averaging_constant)
        # lerp from infinity gives NaN, so torch.where takes the first batch itself, without a device synchronization.
        low = torch.where(self.min_val.isfinite(), torch.lerp(self.min_val, low, weight), low)
        high = torch.where(self.max_val.isfinite(), torch.lerp(self.max_val, high, weight), high)
        return low, high

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._common = None

    def _nothing(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The extremes of an empty set: ``inf`` and ``-inf``."""
        shape = (x.shape[self.ch_axis],) if self.per_channel else ()
        low = torch.full(shape, float("inf"), device=x.device)
        return low, -low


class PerChannelMovingAverageMinMaxObserver(MovingAverageMinMaxObserver):
    """:class:`MovingAverageMinMaxObserver` for per-channel schemes.

    torchao passes ``ch_axis`` only to classes with PerChannel in their name.

    Example:
        >>> import torch
        >>> from quantflow.observers import PerChannelMovingAverageMinMaxObserver
        >>> observer = PerChannelMovingAverageMinMaxObserver(qscheme=torch.per_channel_affine, ch_axis=1)
        >>> _ = observer(torch.tensor([[-1.0, 2.0], [-3.0, 4.0]]))
        >>> observer.min_val, observer.max_val
        (tensor([-3.,  2.]), tensor([-1.,  4.]))
    """


def for_training(observer: Observer, *, weight: bool) -> MovingAverageMinMaxObserver:
    """The observer for fake quantize with the settings of ``observer``: a moving average for activations, the newest range for
    weights.
    """
    return MovingAverageMinMaxObserver(1.0 if weight or observer.is_dynamic else 0.01, **observer.spec())
