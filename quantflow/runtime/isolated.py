"""Programs run in a process of their own: one that crashes the runtime leaves the caller's process alive.

A server process is started once, with the runtime loaded; it forks a child for each process that has programs to run, and
with another after a crash.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
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
    """Start the server now, to be ready when the first program is."""
    with _LOCK:
        _server()


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
            if not worker.connection.poll(seconds):
                worker.kill()
                return Trial(failure=f"no end after {seconds:g} s", operators=failed_operators(worker.log()))
            said = json.loads(worker.connection.recv_bytes())
            outputs = decode(worker.connection.recv_bytes(), worker.connection.recv_bytes())
        except (EOFError, OSError):
            code, log = worker.ended(), worker.log()
            return Trial(failure=_with(_how_it_ended(code, log), log), operators=failed_operators(log))
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


class _Server:
    """The process that forks the children. Forks of the process that started it share it, and it lives as long as they."""

    def __init__(self) -> None:
        self.folder, self.owner = Path(tempfile.mkdtemp(prefix="quantflow-")), os.getpid()
        self.address = str(self.folder / "runtime")
        self._alive, theirs = socket.socketpair()
        path = os.pathsep.join(p or os.getcwd() for p in sys.path)
        with theirs, socket.socket(socket.AF_UNIX) as listening:
            listening.bind(self.address)
            listening.listen(64)
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "quantflow.runtime.worker",
                    *(str(s.fileno()) for s in (listening, theirs)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[listening.fileno(), theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
            )
        atexit.register(self.end)

    def connect(self) -> socket.socket:
        """A connection to it, once it listens."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(_START)
        client.connect(self.address)
        return client

    def alive(self) -> bool:
        """Whether it runs; of another process's server this is not known before it is asked."""
        return self.owner != os.getpid() or self.process.poll() is None

    def end(self) -> None:
        """Let it end, where this process started it."""
        if self.owner == os.getpid():
            self._alive.close()
            shutil.rmtree(self.folder, ignore_errors=True)


class _Worker:
    """The child of the server that runs this process's programs, and what it logs."""

    def __init__(self, server: _Server) -> None:
        self.owner, self.server = os.getpid(), server
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process
        self._read = 0
        with server.connect() as client:
            socket.send_fds(client, [b"run"], [self._log.fileno()])
            self.pid = int(client.recv(16, socket.MSG_WAITALL))
            client.settimeout(None)  # a file descriptor that does not block, as a connection wants it
            self.connection = Connection(os.dup(client.fileno()))
        self.running = True

    def log(self) -> str:
        """What was logged since this was last asked."""
        self._log.seek(self._read)
        text = self._log.read()
        self._read += len(text)
        return text.decode("utf-8", "replace")

    def kill(self) -> None:
        """End it, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        self.ended()

    def ended(self) -> int:
        """How it ended: an exit code, or a signal as a negative number."""
        self.connection.close()
        self.running = False
        with self.server.connect() as client:
            client.sendall(f"wait {self.pid}".encode())
            return int(client.recv(16))


_LOCK = threading.Lock()
_shared: _Server | None = None
_own: _Worker | None = None


def _server() -> _Server:
    global _shared
    if _shared is None or not _shared.alive():
        _shared = _Server()
    return _shared


def _worker() -> _Worker:
    global _own
    if _own is None or _own.owner != os.getpid() or not _own.running or _own.connection.poll():  # it ended when idle
        _own = _Worker(_server())
    _own.log()
    return _own
