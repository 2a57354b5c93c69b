"""The fork server and its children as this process holds them; :mod:`quantflow.runtime.worker` is the other side.

All of it goes over pairs of sockets without a name. A socket whose other end is closed tells that the other side is gone, also
where it was killed, and nothing is left behind.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait

from quantflow.errors import QuantflowError

NUMBER = 16  # bytes of a number that the server sends
_START = 120.0  # seconds for imports, on a machine that is busy
REMEDY = "see that this Python runs `import quantflow.runtime.worker` in a process of its own"


class Log:
    """A file without a name that another process writes and this one reads."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  open as long as the process that writes it
        self._read = 0

    def fileno(self) -> int:
        return self._file.fileno()

    def news(self) -> str:
        """What was written since this was last asked."""
        size = os.fstat(self.fileno()).st_size - self._read
        text = os.pread(self.fileno(), size, self._read)  # both processes share the file's position
        self._read += len(text)
        return text.decode("utf-8", "replace")

    def close(self) -> None:
        self._file.close()


class ForkServer:
    """A process with the runtime loaded that forks a child for each process that asks.

    Forks of the process that started it share it. It ends once all of them have.
    """

    def __init__(self) -> None:
        self._log, self._owner = Log(), os.getpid()
        self._requests, theirs = socket.socketpair()
        try:
            with theirs:
                self.pid = start(theirs, self._log)
        except BaseException:
            self._requests.close()
            self._log.close()
            raise

    def fork(self) -> Worker:
        """A new child of it.

        Raises:
            ConnectionError: where it has ended, or can't fork.
            QuantflowError: at stage ``"runtime"``, where it does not answer.
        """
        return Worker(self)

    def gone(self) -> bool:
        """Whether it has ended."""
        return hung_up(self._requests)

    def ask(self, control: socket.socket, connection: socket.socket, log: Log) -> None:
        """Have it fork a child with these."""
        socket.send_fds(self._requests, [b"+"], [control.fileno(), connection.fileno(), log.fileno()])

    def answer(self, control: socket.socket) -> int:
        """The number of the child that it forked for the owner of ``control``."""
        ready = wait([control, self._requests], _START)
        if not ready:
            raise QuantflowError("runtime", f"the fork server does not answer in {_START:g} s", remedy=REMEDY)
        if control not in ready or not (pid := int(control.recv(NUMBER) or 0)):
            raise ConnectionError("the fork server has ended, or can't fork")
        return pid

    def close(self) -> str:
        """Let go of it; the last line that it logged."""
        lines = self._log.news().strip().splitlines()
        if self._owner == os.getpid() and self.gone():
            with contextlib.suppress(ChildProcessError):  # whoever ignores such signals has none to wait for
                os.waitpid(self.pid, 0)
        self._requests.close()
        self._log.close()
        return lines[-1][:200] if lines else ""


class Worker:
    """A child of the server that runs this process's programs.

    Attributes:
        pid: Its number.
        connection: Over which it takes programs and answers.
        log: What it and the runtime write.
        idle: Whether it has answered all that it was sent.
    """

    def __init__(self, server: ForkServer) -> None:
        self.log, self.idle = Log(), True
        self._control, control = socket.socketpair()
        ours, theirs = socket.socketpair()
        self.connection = Connection(ours.detach())
        try:
            with control, theirs:
                server.ask(control, theirs, self.log)
                self.pid = server.answer(self._control)
        except BaseException:
            self.close()
            raise

    def gone(self) -> bool:
        """Whether it has ended."""
        return hung_up(self.connection)

    def ended(self) -> int | None:
        """How it ended, once it has: an exit code, or a signal as a negative number; None where the server is gone as well."""
        try:
            code = self._control.recv(NUMBER)
        except ConnectionError:
            code = b""
        return int(code) if code else None

    def kill(self) -> None:
        """End it, whatever it does."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        if self.ended() is None and not self.gone():  # a process without a parent that could end it
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Let go of it; the server ends it once no process holds it."""
        for held in (self._control, self.connection, self.log):
            held.close()


def hung_up(end: socket.socket | Connection) -> bool:
    """Whether the other end is closed."""
    poll = select.poll()
    poll.register(end, select.POLLHUP)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))


def start(requests: socket.socket, log: Log) -> int:
    """Start a server that reads ``requests`` and writes to ``log``; its number.

    A session of its own keeps the signals of a terminal and of a notebook from it.

    Raises:
        QuantflowError: at stage ``"runtime"``, where this machine can't start it.
    """
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    command = [sys.executable, "-P", "-m", "quantflow.runtime.worker"]
    files: Sequence[tuple] = [
        (os.POSIX_SPAWN_DUP2, requests.fileno(), 0),
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_DUP2, log.fileno(), 2),
    ]
    try:
        return os.posix_spawn(command[0], command, {**os.environ, "PYTHONPATH": path}, file_actions=files, setsid=True)
    except OSError as error:
        reason = f"the fork server does not start: {error}"
        raise QuantflowError("runtime", reason, remedy=REMEDY) from error
