"""Measurement of the latency of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

_LONGEST = 20.0  # seconds after which no further calls are measured, once the minimum is reached
_FEWEST = 5


@dataclass(frozen=True)
class Latency:
    """The wall-clock time of one call.

    Attributes:
        median_ms: The median, milliseconds.
        low_ms: The first quartile, milliseconds.
        high_ms: The third quartile, milliseconds.
        runs: The number of measured calls.
        warm_up: The number of calls before these, which are not measured.
        rows: Examples per call.
        threads: The number of threads that a call may use.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    warm_up: int
    rows: int
    threads: int


def measure(call: Callable[[], object], *, rows: int, threads: int, runs: int = 30, warm_up: int = 5) -> Latency:
    """Measure ``runs`` calls; after 20 s fewer, but at least 5.

    Args:
        call: The function to measure.
        rows: Examples per call, for the record.
        threads: Threads that a call may use, for the record.
        runs: Measured calls; at least 2, to have a spread.
        warm_up: Calls before these, which are not measured.
    """
    times: list[float] = []
    runs = max(runs, 2)
    begun = time.perf_counter()
    while len(times) < warm_up + runs:
        start = time.perf_counter()
        call()
        times.append((time.perf_counter() - start) * 1000)
        if time.perf_counter() - begun > _LONGEST and len(times) >= warm_up + _FEWEST:
            break
    low, median, high = statistics.quantiles(times[warm_up:], n=4, method="inclusive")
    return Latency(median, low, high, len(times) - warm_up, warm_up, rows, threads)
