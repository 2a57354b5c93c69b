"""Temporary replacement of attributes of other modules, by one thread at a time. It uses no private name itself."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

_lock = threading.RLock()
_holder: int | None = None  # the thread that holds the lock
# The current replacements: owner, name, old value, and whether the owner itself defined the name.
_standing: list[tuple[Any, str, Any, bool]] = []


@contextlib.contextmanager
def exclusively() -> Iterator[None]:
    """Keep other threads of this process out of this context. All threads see the replacements."""
    global _holder
    with _lock:
        before, _holder = _holder, threading.get_ident()
        try:
            yield
        finally:
            _holder = before


@contextlib.contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Replace ``owner.name`` by ``new`` within the context. The caller must be within :func:`exclusively`."""
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
    """After a fork, in the child: undo the replacements of another thread and free its lock, because the thread is missing."""
    global _lock, _holder
    if _holder not in (None, threading.get_ident()):
        while _standing:
            _put_back(*_standing.pop())
        _lock, _holder = threading.RLock(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alone)
