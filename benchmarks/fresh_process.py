"""Measurements in a new process, independent of earlier ones."""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def in_fresh_process(function: Callable[..., T], *args: object) -> T:
    """Return or raise the result of ``function(*args)`` in a new interpreter; ``function`` is a module-level function."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_growth(work: Callable[[], object]) -> int:
    """The peak growth of the resident set of this process while ``work`` runs, bytes (Linux, glibc)."""
    ctypes.CDLL(None).malloc_trim(0)  # freed but kept memory would hide the growth
    Path("/proc/self/clear_refs").write_text("5")  # reset the recorded peak
    before = _resident_peak()
    work()
    return _resident_peak() - before


def _resident_peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
