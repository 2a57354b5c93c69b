"""Whether the examples of a batch act on each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from quantflow.metrics import signal_to_noise
from quantflow.recovery.walk import outputs

_SQNR = 40.0  # dB: what the order of sums may make of float outputs


def examples_interact(graph: GraphModule, batch: tuple, cut: Sequence[bool]) -> bool:
    """Whether the outputs of the float network for an example depend on the others of its batch.

    Args:
        graph: A captured or prepared graph.
        batch: Its flat inputs.
        cut: Which of them hold a row for each example. Where none does, a batch is one example.

    Returns:
        True also where the network does not run on fewer examples, or where an output joins the examples of the batch.
    """
    size = next((int(given.shape[0]) for given, by_example in zip(batch, cut, strict=True) if by_example), 1)
    if size == 1:
        return False

    def rows(start: int, stop: int) -> tuple[Any, ...]:
        return tuple(given[start:stop] if by_example else given for given, by_example in zip(batch, cut, strict=True))

    try:
        together, *alone = outputs(graph, [batch, rows(0, 1), rows(1, size)], integers=False)
    except (RuntimeError, IndexError, ValueError):
        return True
    return not all(map(_joins, together, *alone))


def _joins(together: torch.Tensor, first: torch.Tensor, rest: torch.Tensor) -> bool:
    """Whether ``together`` is both parts one behind the other, along any dimension, or does not depend on the batch at all."""
    if first.shape == rest.shape == together.shape:
        return all(signal_to_noise(together, part) >= _SQNR for part in (first, rest))
    for dim in range(together.ndim):
        sizes = [list(part.shape) for part in (first, rest, together)]
        if sizes[0].pop(dim) + sizes[1].pop(dim) == sizes[2].pop(dim) and sizes[0] == sizes[1] == sizes[2]:
            return signal_to_noise(together, torch.cat([first, rest], dim)) >= _SQNR
    return False
