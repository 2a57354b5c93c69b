"""The base class of observers that need a distribution: a bounded random sample of the observed values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from quantflow.distributed import gathered
from quantflow.observers.min_max import MinMaxObserver
from quantflow.qparams.qparams import choose_qparams

T = TypeVar("T")
BATCHES = 16
_PER_TENSOR = 2048
_PER_CHANNEL = 512


class SampledObserver(MinMaxObserver):
    """Exact extremes over all data, and a reservoir of at most 16 batches, of each 2,048 values (512 a channel).

    Memory does not grow with the data. A batch of fewer values counts whole. The same data give the same sample, also when
    the state is saved in between.

    Attributes:
        sample: float32 [batches, channels, values]; one channel for per-tensor schemes.
        batches: How many batches were seen.
        count: How many values, in the largest channel.
    """

    sample: torch.Tensor
    batches: torch.Tensor
    count: torch.Tensor
    resized = (*MinMaxObserver.resized, "sample")

    def __init__(self, **spec: Any) -> None:
        super().__init__(**spec)
        self.reset()

    def reset(self) -> None:
        """Clear the extremes and the sample."""
        super().reset()
        device = self.min_val.device
        self.register_buffer("sample", torch.empty(0, 1, _PER_TENSOR, device=device))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self._found: tuple[torch.Tensor, torch.Tensor] | None = None
        self._common: dict[str, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not x.numel():
            return x
        super().forward(x)
        self._found = None
        place = seen = int(self.batches)
        random = torch.Generator().manual_seed(seen)
        self.batches = self.batches + 1
        if seen >= BATCHES:  # reservoir sampling: every batch is kept with the same probability
            place = int(torch.randint(seen + 1, (), generator=random))
        rows = x.detach()
        rows = rows.movedim(self.ch_axis, 0).flatten(1) if self.per_channel else rows.reshape(1, -1)
        self.count = self.count + rows.shape[1]
        if place < BATCHES:
            picked = rows[
                :, _pick(rows.shape[1], _PER_CHANNEL if self.per_channel else _PER_TENSOR, random).to(x.device)
            ]
            picked = picked.float() if self.effective_range is None else picked.float().clamp(*self.effective_range)
            kept = self.sample if len(self.sample) else picked[:0].reshape(0, *picked.shape)
            self.sample = torch.cat([kept[:place], picked[None], kept[place + 1 :]])
        return x

    def hold_in_common(self) -> None:
        """Mark the current statistics as common to all processes."""
        self._common = {"sample": self.sample, "count": self.count, "batches": self.batches}

    def synchronize(self) -> None:
        """Merge the extremes and the samples of all processes. Statistics that they had in common before count once."""
        super().synchronize()
        everyone = gathered({"sample": self._own_rows(), "count": self.count, "batches": self.batches})
        if len(everyone) == 1:
            return
        known = self._common or {"sample": self.sample[:0], **dict.fromkeys(("count", "batches"), torch.tensor(0))}
        known = {name: tensor.cpu() for name, tensor in known.items()}
        for name in ("count", "batches"):
            seen = torch.stack([other[name] for other in everyone]).sum() - (len(everyone) - 1) * known[name]
            setattr(self, name, seen.to(self.count.device))
        share = int(known["batches"]) / max(int(self.batches), 1)
        rows = drawn_together(list(known["sample"]), [list(other["sample"]) for other in everyone], BATCHES, share)
        if rows:
            self.sample = torch.stack(rows).to(self.sample.device)
        self._found = None
        self.hold_in_common()

    def _own_rows(self) -> torch.Tensor:
        """The rows of the sample that this process drew since :meth:`hold_in_common`."""
        known = self.sample[:0] if self._common is None else self._common["sample"].to(self.sample.device)
        ours = [i >= len(known) or not torch.equal(row, known[i]) for i, row in enumerate(self.sample)]
        return self.sample[torch.tensor(ours, dtype=torch.bool, device=self.sample.device)]

    def calculate_qparams(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale (float32) and zero point (int32), scalars or one a channel."""
        if not len(self.sample):
            return super().calculate_qparams()
        if self._found is None:
            values = self.sample.transpose(0, 1).flatten(1)  # [channels, values]
            low, high = self.choose_range(values, self.min_val.reshape(-1), self.max_val.reshape(-1))
            self._found = self.grid(low.reshape(self.min_val.shape), high.reshape(self.max_val.shape))
        return self._found

    def choose_range(
        self, values: torch.Tensor, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the range of each channel.

        Args:
            values: The sample, float32 [channels, values].
            low: The least value of each channel over all data, [channels].
            high: The greatest value of each channel over all data, [channels].

        Returns:
            The lower and the upper ends, [channels].
        """
        raise NotImplementedError

    def grid(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the scale and the zero point of ranges.

        Args:
            low: The lower ends, of any shape.
            high: The upper ends, of the same shape.

        Returns:
            The scale (float32) and the zero point (int32), of that shape.
        """
        return choose_qparams(
            low, high, quant_min=self.quant_min, quant_max=self.quant_max, symmetric=self.symmetric, eps=self.eps
        )

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._found = self._common = None


def drawn_together(known: Sequence[T], own: Sequence[Sequence[T]], most: int, share: float) -> list[T]:
    """A sample of the draws of several processes.

    Args:
        known: Draws that all processes have in common; a random part of them is taken, the same in each process.
        own: The draws of each process since then, taken in turn.
        most: The largest size of the sample.
        share: The share of ``known`` draws in the sample, 0 to 1.
    """
    turns = [drawn[i] for i in range(most) for drawn in own if i < len(drawn)]
    few = min(len(known), max(round(most * share), most - len(turns)))
    picked = torch.randperm(len(known), generator=torch.Generator().manual_seed(len(turns)))[:few].sort().values
    return [*(known[int(i)] for i in picked), *turns[: most - few]]


def _pick(size: int, most: int, random: torch.Generator) -> torch.Tensor:
    """Indices of at most ``most`` of ``size`` values: all of them if there are few, else a random choice."""
    if size <= most:
        return torch.arange(most) % size
    if size <= 8 * most:
        return torch.randperm(size, generator=random)[:most]
    return torch.randint(size, (most,), generator=random)
