"""Measurements in a process of their own, on which nothing that ran before weighs."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def in_fresh_process(function: Callable[..., T], *args: object) -> T:
    """What ``function(*args)``, a function of a module, returns or raises in a new interpreter."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_growth(work: Callable[[], object]) -> int:
    """By how many bytes the resident set of this process grows at most while ``work`` runs (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would take the growth in
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = _resident_peak()
    work()
    return _resident_peak() - before


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
