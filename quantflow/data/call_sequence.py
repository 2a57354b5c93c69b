"""``CallSequence``: batches that a network with state gets one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence


class CallSequence:
    """Batches that a network with state (a cache, a recurrent layer's) gets one after the other, from its first state on.

    Data that hold sequences are taken by whatever takes batches: at the beginning of each sequence, the state is again what it
    was before the first one. State goes on between batches that are in no sequence.

    Args:
        batches: The batches, as for :func:`quantflow.calibrate`.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> class Sum(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(self.total.add_(x))
        >>> model = Sum(8, 4).eval()
        >>> model.register_buffer("total", torch.zeros(1, 8))
        >>> calls = qf.CallSequence([torch.randn(1, 8) for _ in range(5)])
        >>> result = qf.quantize(model, (torch.zeros(1, 8),), [calls], dynamic_batch=False, progress=False)
        >>> len(calls), result.program.delegation.calls
        (5, 1)
    """

    def __init__(self, batches: Iterable[object]) -> None:
        self._batches: Sequence[object] = batches if isinstance(batches, Sequence) else list(batches)

    def __iter__(self) -> Iterator[object]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)
