"""Whether the outputs for an example depend on the other examples of its batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch.fx import GraphModule

from quantflow.metrics import signal_to_noise
from quantflow.simulation.network import outputs

_SQNR = 40.0  # dB: float outputs differ by the order of sums


def examples_of(batch: tuple, cut: Sequence[bool]) -> int:
    """The number of examples in the flat inputs ``batch``; 1 if no input is ``cut`` by example."""
    return next((int(given.shape[0]) for given, by_example in zip(batch, cut, strict=False) if by_example), 1)


def examples_interact(graph: GraphModule, batch: tuple, cut: Sequence[bool]) -> bool:
    """Whether the outputs of the float network for an example depend on the others of its batch.

    Args:
        graph: A captured or prepared graph.
        batch: Its flat inputs.
        cut: Which of them hold a row for each example. Where none does, a batch is one example.

    Returns:
        True also where the network does not run on fewer examples, or where an output joins the examples of the batch.
    """
    size = examples_of(batch, cut)
    if size == 1:
        return False

    def rows(start: int, end: int) -> tuple[object, ...]:
        paired = itertools.zip_longest(batch, cut)  # behind the inputs, the state
        return tuple(given[start:end] if by_example else given for given, by_example in paired)

    try:
        together, *alone = outputs(graph, [batch, rows(0, 1), rows(1, size)], integers=False)
    except (RuntimeError, IndexError, ValueError):
        return True
    return not all(_joins(whole, first, rest, size) for whole, first, rest in zip(together, *alone, strict=True))


def _joins(together: torch.Tensor, first: torch.Tensor, rest: torch.Tensor, size: int) -> bool:
    """Whether ``together``, of ``size`` examples, is the ``first`` and the ``rest`` of them side by side along any dimension,
    alone or merged with others before it; or does not depend on the batch at all.
    """
    if first.shape == rest.shape == together.shape:
        return all(signal_to_noise(together, part) >= _SQNR for part in (first, rest))
    for dim in range(together.ndim):
        if first.shape[dim] * size == together.shape[dim] and first.shape[dim] * (size - 1) == rest.shape[dim]:
            for inner in _divisors(first.shape[dim]):  # an example's share of the dimension
                split = [t.unflatten(dim, (-1, n * inner)) for t, n in ((together, size), (first, 1), (rest, size - 1))]
                if signal_to_noise(split[0], torch.cat(split[1:], dim + 1)) >= _SQNR:
                    return True
    return False


def _divisors(number: int) -> list[int]:
    return [n for n in range(number, 0, -1) if number % n == 0]
