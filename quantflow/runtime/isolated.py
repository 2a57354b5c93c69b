"""Programs run in a process of their own: one that crashes the runtime leaves the caller's process alive.

The process is started once, kept while programs come, and started again after a crash.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import IO, Any

from quantflow.runtime.messages import explanation, failed_operators

_START = 120.0  # seconds for imports, on a machine that is busy


@dataclass(frozen=True)
class Trial:
    """How a program fared.

    Attributes:
        outputs: The flat outputs of each call that ran.
        loaded: Whether ``forward`` loaded.
        failure: Why it does not load or run; ``""`` where all calls ran.
        operators: Operators whose kernel is missing or failed, where the runtime names them.
    """

    outputs: list[list[Any]] = field(default_factory=list)
    loaded: bool = False
    failure: str = ""
    operators: tuple[str, ...] = ()


def warm_up() -> None:
    """Start the process now, to be ready when the first program is."""
    with _LOCK:
        _worker()


def run(buffer: bytes, calls: Sequence[Sequence[Any]] = (), *, seconds: float = 600.0) -> Trial:
    """Load ``forward`` of the program ``buffer`` and call it on each of ``calls``, one after the other.

    Args:
        buffer: The bytes of a ``.pte``.
        calls: The flat inputs of each call: tensors, numbers, texts and None.
        seconds: How long all of it may take.
    """
    from quantflow.runtime.worker import decode, encode

    with _LOCK:
        worker = _worker()
        try:
            for message in (buffer, *encode([list(inputs) for inputs in calls])):
                worker.connection.send_bytes(message)
            if not worker.connection.poll(seconds + (0.0 if worker.served else _START)):
                worker.end()
                return Trial(failure=f"no end after {seconds:g} s", operators=failed_operators(worker.log()))
            said = json.loads(worker.connection.recv_bytes())
            outputs = decode(worker.connection.recv_bytes(), worker.connection.recv_bytes())
            worker.served = True
        except (EOFError, OSError):
            code, log = worker.end(), worker.log()
            reason = _how_it_ended(code, log)
            return Trial(failure=_with(reason, log), operators=failed_operators(log))
        log = worker.log()
    if not said["failure"]:
        return Trial(outputs, loaded=True)
    operators = tuple(dict.fromkeys([*said["operators"], *failed_operators(log)]))
    return Trial(outputs, said["loaded"], _with(said["failure"], log), operators)


def _with(reason: str, log: str) -> str:
    why = explanation(log)
    return f"{reason} ({why})" if why else reason


def _how_it_ended(code: int, log: str) -> str:
    if code < 0:
        return f"the runtime crashes on it: {signal.Signals(-code).name}"
    last = log.strip().splitlines()[-1:]
    return f"the process that tried it failed with exit code {code}" + (f": {last[0][:200]}" if last else "")


class _Worker:
    """The process, and what it logs."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.owner, self.served = os.getpid(), False
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        self._read = 0
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "quantflow.runtime.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )
        self.connection = Connection(ours.detach())

    def alive(self) -> bool:
        """Whether it serves this process, which is not the case in a fork of the one that started it."""
        return self.owner == os.getpid() and self.process.poll() is None

    def log(self) -> str:
        """What was logged since this was last asked."""
        self._log.seek(self._read)
        text = self._log.read()
        self._read += len(text)
        return text.decode("utf-8", "replace")

    def end(self) -> int:
        """End the process; its exit code."""
        self.connection.close()
        if self.owner != os.getpid():
            return 0
        try:
            return self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


_LOCK = threading.Lock()
_current: _Worker | None = None


def _worker() -> _Worker:
    global _current
    if _current is None or not _current.alive():
        _current = _Worker()
        atexit.register(_current.end)
    _current.log()
    return _current
