"""How long a call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_LONGEST = 20.0  # seconds that the measured calls may take, but for the fewest
_FEWEST = 5


@dataclass(frozen=True)
class Latency:
    """The time of one call, wall clock.

    Attributes:
        median_ms: Its median, milliseconds.
        low_ms: A quarter of the calls were faster.
        high_ms: A quarter of the calls were slower.
        runs: How many calls that is.
        warm_up: How many calls went before, unmeasured.
        rows: Examples in a call.
        threads: How many threads it may use.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    warm_up: int
    rows: int
    threads: int


def measure(call: Callable[[], Any], *, rows: int, threads: int, runs: int = 30, warm_up: int = 5) -> Latency:
    """Call ``call`` again and again; fewer than ``runs`` times where 20 s are over, but at least 5.

    Args:
        call: What to measure.
        rows: Examples in a call, to be told.
        threads: Threads it may use, to be told.
        runs: Measured calls, 2 or more: fewer have no spread.
        warm_up: Calls before these.
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
