"""Execution of programs in a separate process, so that a crash of the runtime does not end the calling process.

A server process with the runtime loaded is started once. It forks a child for each process that has programs to run, and
another one after a crash.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from quantflow.errors import QuantflowError
from quantflow.runtime.fork_server import REMEDY, ForkServer, Worker
from quantflow.runtime.messages import explanation, failed_operators


@dataclass(frozen=True)
class Trial:
    """The result of running a program.

    Attributes:
        outputs: The flat outputs of each call that ran.
        loaded: Whether ``forward`` loaded.
        failure: Why the program does not load or run; ``""`` if all calls ran.
        operators: Operators whose kernel is missing or failed, if the runtime names them.
    """

    outputs: list[list[Any]] = field(default_factory=list)
    loaded: bool = False
    failure: str = ""
    operators: tuple[str, ...] = ()


def warm_up() -> None:
    """Start the server before the first program needs it. If the server can't start, :func:`run` raises the error."""
    with _LOCK, contextlib.suppress(QuantflowError):
        _server()


def run(buffer: bytes, calls: Sequence[Sequence[object]] = (), *, seconds: float = 600.0) -> Trial:
    """Load ``forward`` of the program ``buffer`` and call it on each of ``calls``, one after the other.

    Args:
        buffer: The bytes of a ``.pte``.
        calls: The flat inputs of each call: tensors, numbers, strings and None.
        seconds: The time limit for all calls together.

    Raises:
        QuantflowError: at stage ``"runtime"``, if no process can be started.
    """
    from quantflow.runtime.worker import decode, encode

    messages = (buffer, *encode([list(inputs) for inputs in calls]))
    with _LOCK:
        worker = _worker()
        worker.idle = False  # after an interrupt, a late answer would be read as that of the next program
        try:
            for message in messages:
                worker.connection.send_bytes(message)
            if not worker.connection.poll(seconds):
                worker.kill()
                return Trial(failure=f"no end after {seconds:g} s", operators=failed_operators(worker.log.news()))
            said = json.loads(worker.connection.recv_bytes())
            outputs = decode(worker.connection.recv_bytes(), worker.connection.recv_bytes())
        except BaseException as error:
            if isinstance(error, (EOFError, OSError)) and worker.gone():
                code, log = worker.ended(), worker.log.news()
                return Trial(failure=_with(_how_it_ended(code, log), log), operators=failed_operators(log))
            worker.kill()
            raise
        worker.idle = True
        log = worker.log.news()
    if not said["failure"]:
        return Trial(outputs, loaded=True)
    operators = tuple(dict.fromkeys([*said["operators"], *failed_operators(log)]))
    return Trial(outputs, said["loaded"], _with(said["failure"], log), operators)


def _with(reason: str, log: str) -> str:
    why = explanation(log)
    return f"{reason} ({why})" if why else reason


def _how_it_ended(code: int | None, log: str) -> str:
    if code is None:
        return "the process that ran it ended, and so did the fork server, which held its exit code"
    if code < 0:
        return f"the runtime crashes on it: {signal.Signals(-code).name}"
    last = log.strip().splitlines()[-1:]
    return f"the process that ran it failed with exit code {code}" + (f": {last[0][:200]}" if last else "")


_LOCK = threading.Lock()
_shared: ForkServer | None = None
_own: Worker | None = None


def _server() -> ForkServer:
    global _shared
    if _shared is not None and _shared.gone():
        _drop_server()
    if _shared is None:
        _shared = ForkServer()
    return _shared


def _drop_server() -> str:
    """Release the server and return the last line of its log."""
    global _shared
    server, _shared = _shared, None
    return server.close() if server is not None else ""


def _worker() -> Worker:
    """An idle child process of the server.

    Raises:
        QuantflowError: at stage ``"runtime"``, if no child can be started.
    """
    global _own
    if _own is not None:
        if _own.idle and not _own.gone():
            _own.log.news()
            return _own
        _drop_worker()
    for _ in range(2):  # a server that is about to end may still accept a request
        try:
            _own = _server().fork()
            return _own
        except ConnectionError:
            last = _drop_server()
    reason = "the fork server ends on a request" + (f": {last}" if last else "")
    raise QuantflowError("runtime", reason, remedy=REMEDY)


def _drop_worker() -> None:
    global _own
    worker, _own = _own, None
    if worker is not None:
        worker.close()


def _after_fork() -> None:
    """After a fork, in the child: replace the lock, whose thread may be missing, and drop the worker of the parent."""
    global _LOCK
    _LOCK = threading.Lock()
    _drop_worker()


@atexit.register
def _at_exit() -> None:
    _drop_worker()
    _drop_server()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
