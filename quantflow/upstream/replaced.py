"""Names of other modules, replaced for a while by one thread at a time."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

_lock = threading.RLock()
_holder: int | None = None  # the thread that has it
# What is replaced now: where, its name, what was there, and whether that was its own.
_standing: list[tuple[Any, str, Any, bool]] = []


@contextlib.contextmanager
def exclusively() -> Iterator[None]:
    """Let no other thread of this process in for a while. What is replaced is seen by all."""
    global _holder
    with _lock:
        before, _holder = _holder, threading.get_ident()
        try:
            yield
        finally:
            _holder = before


@contextlib.contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """``owner.name`` is ``new`` for a while; only within :func:`exclusively`."""
    entry = owner, name, getattr(owner, name), name in vars(owner)
    _standing.append(entry)
    setattr(owner, name, new)
    try:
        yield
    finally:
        _put_back(*entry)
        _standing.remove(entry)


def _put_back(owner: Any, name: str, old: Any, own: bool) -> None:
    setattr(owner, name, old) if own else delattr(owner, name)


def _alone() -> None:
    """In a fork: what another thread had replaced is put back, and its lock is free, since that thread is not there."""
    global _lock, _holder
    if _holder not in (None, threading.get_ident()):
        while _standing:
            _put_back(*_standing.pop())
        _lock, _holder = threading.RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alone)
