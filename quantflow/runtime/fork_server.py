"""The client side of the fork server and its child processes; :mod:`quantflow.runtime.worker` is the server side.

Client and server communicate through unnamed socket pairs. A closed socket shows that the other process has ended, also if it
was killed. No file is left behind.
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
_START = 120.0  # seconds for imports on a busy machine
REMEDY = "check that this Python runs `import quantflow.runtime.worker` in a new process"


class Log:
    """An unnamed file that another process writes and this process reads."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  open as long as the process that writes it
        self._read = 0

    def fileno(self) -> int:
        return self._file.fileno()

    def news(self) -> str:
        """Return the text that was written since the last call."""
        size = os.fstat(self.fileno()).st_size - self._read
        text = os.pread(self.fileno(), size, self._read)  # both processes share the file's position
        self._read += len(text)
        return text.decode("utf-8", "replace")

    def close(self) -> None:
        self._file.close()


class ForkServer:
    """A process with the runtime loaded that forks a child process for each client.

    Forks of the process that started the server share it. The server ends when all of them have ended.
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
        """Return a new child process of the server.

        Raises:
            ConnectionError: if the server has ended or can't fork.
            QuantflowError: at stage ``"runtime"``, if the server does not answer.
        """
        return Worker(self)

    def gone(self) -> bool:
        """Whether the server has ended."""
        return hung_up(self._requests)

    def ask(self, control: socket.socket, connection: socket.socket, log: Log) -> None:
        """Request a child process that uses these sockets and this log."""
        socket.send_fds(self._requests, [b"+"], [control.fileno(), connection.fileno(), log.fileno()])

    def answer(self, control: socket.socket) -> int:
        """Return the process id of the child that was forked for the owner of ``control``."""
        ready = wait([control, self._requests], _START)
        if not ready:
            raise QuantflowError("runtime", f"the fork server does not answer in {_START:g} s", remedy=REMEDY)
        if control not in ready or not (pid := int(control.recv(NUMBER) or 0)):
            raise ConnectionError("the fork server has ended, or can't fork")
        return pid

    def close(self) -> str:
        """Release the server and return the last line of its log."""
        lines = self._log.news().strip().splitlines()
        if self._owner == os.getpid() and self.gone():
            with contextlib.suppress(ChildProcessError):  # a process that ignores SIGCHLD has no child to wait for
                os.waitpid(self.pid, 0)
        self._requests.close()
        self._log.close()
        return lines[-1][:200] if lines else ""


class Worker:
    """A child process of the server that runs the programs of this process.

    Attributes:
        pid: The process id.
        connection: The connection for programs and answers.
        log: The output of the child and the runtime.
        idle: Whether the child has answered all messages.
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
        """Whether the child has ended."""
        return hung_up(self.connection)

    def ended(self) -> int | None:
        """Wait for the end of the child and return its exit code, or a signal as a negative number; None without a server."""
        try:
            code = self._control.recv(NUMBER)
        except ConnectionError:
            code = b""
        return int(code) if code else None

    def kill(self) -> None:
        """Kill the child."""
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_WR)
        if self.ended() is None and not self.gone():  # the server has ended and can't kill the child
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Release the child. The server ends it when no process uses it."""
        for held in (self._control, self.connection, self.log):
            held.close()


def hung_up(end: socket.socket | Connection) -> bool:
    """Whether the other end is closed."""
    poll = select.poll()
    poll.register(end, select.POLLHUP)
    return any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))


def start(requests: socket.socket, log: Log) -> int:
    """Start a server that reads ``requests`` and writes to ``log``, and return its process id.

    The server gets its own POSIX session, so it receives no signals of a terminal or notebook.

    Raises:
        QuantflowError: at stage ``"runtime"``, if this machine can't start the server.
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
