"""The server side of :mod:`quantflow.runtime.isolated`: a process that forks a child for each client with programs to run.

The server has the runtime loaded and a single thread, so a child starts at once, also after a crash. A child ends when its
client ends. The server ends when the last process that can send requests ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

import torch
from safetensors.torch import load, save

from quantflow import runtime
from quantflow.errors import QuantflowError
from quantflow.runtime.fork_server import NUMBER
from quantflow.runtime.in_process import missing_kernels

IDLE = 300.0  # seconds without a program after which a child ends


def encode(values: Sequence[Sequence[object]]) -> tuple[bytes, bytes]:
    """Encode lists of tensors, numbers, strings and None as JSON that refers to tensors by name, and the tensors."""
    tensors: dict[str, torch.Tensor] = {}

    def told(value: object) -> dict[str, object]:
        if not isinstance(value, torch.Tensor):
            return {"value": value}
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}

    text = json.dumps([[told(value) for value in row] for row in values])
    return text.encode(), save(tensors)


def decode(text: bytes, blob: bytes) -> list[list[Any]]:
    """Return the argument of :func:`encode` from its result."""
    tensors = load(blob)
    return [[tensors[v["tensor"]] if "tensor" in v else v["value"] for v in row] for row in json.loads(text)]


def serve(connection: Connection) -> None:
    """Run programs until the connection ends or no program arrives within the idle time.

    A program arrives as three messages: its bytes, and the inputs of its calls from :func:`encode`. The answer is a JSON
    message and the encoded outputs of the calls that ran.
    """
    while connection.poll(IDLE):
        try:
            buffer, text, blob = (connection.recv_bytes() for _ in range(3))
        except EOFError:
            return
        outputs: list[list[object]] = []
        said: dict[str, Any] = {"loaded": False, "failure": "", "operators": []}
        try:
            program = runtime.load_program(buffer)
            method = runtime.load_method(program, "forward", buffer)
            said["loaded"] = True
            for inputs in decode(text, blob):
                outputs.append([_own(value) for value in runtime.execute(method, "forward", inputs)])
        except QuantflowError as error:
            said["failure"] = error.reason
            said["operators"] = [] if said["loaded"] else missing_kernels(buffer, "forward")
        connection.send_bytes(json.dumps(said).encode())
        for message in encode(outputs):
            connection.send_bytes(message)


def _own(value: object) -> object:
    """A copy of ``value``, because the next call overwrites the memory of the runtime."""
    return value.clone() if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class _Child:
    """A child process that serves one client.

    Attributes:
        pid: The process id.
        control: A socket that sends the exit code to the client. Its end of file means that the client has ended or wants
            the child to end.
        life: A pipe that closes when the child ends.
    """

    pid: int
    control: socket.socket
    life: Connection

    def end(self, ready: Sequence[object]) -> bool:
        """Kill the child if its control socket is ``ready``. Return whether the child has ended."""
        if self.control in ready:
            os.kill(self.pid, signal.SIGKILL)
        elif self.life not in ready:
            return False
        code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        _tell(self.control, code)
        self.control.close()
        self.life.close()
        return True


def listen(requests: socket.socket) -> None:
    """Fork a child for each of the ``requests``, until no process is left that can send one.

    A request is one byte and three file descriptors: the ``control`` of the child, the connection that it serves, and its log.
    The answer is the process id of the child, 0 for none, and its exit code once the child has ended.
    """
    children: list[_Child] = []
    while True:
        ready = wait([requests, *(end for child in children for end in (child.control, child.life))])
        children = [child for child in children if not child.end(ready)]
        if requests in ready:
            word, files, _, _ = socket.recv_fds(requests, 1, 3)
            if not word:
                break
            if child := _forked(files, [requests, *(child.control for child in children)]):
                children.append(child)
    for child in children:
        child.end([child.control])


def _forked(files: list[int], held: list[socket.socket]) -> _Child | None:
    """Fork a child for the client that sent ``files``; None if that fails. The child closes ``held``, the server's sockets."""
    if len(files) < 3:  # the process has reached its limit of open files
        for file in files:
            os.close(file)
        return None
    control = socket.socket(fileno=files[0])
    try:
        life, theirs = Pipe(duplex=False)
        child = os.fork()
    except OSError as error:
        print(f"no child: {error}", file=sys.stderr, flush=True)
        child = -1
    if not child:
        for end in (*held, control):
            end.close()
        _serve_and_end(Connection(files[1]), files[2])
    os.close(files[1])
    os.close(files[2])
    _tell(control, max(child, 0))
    if child < 0:
        control.close()
        return None
    theirs.close()
    return _Child(child, control, life)


def _tell(control: socket.socket, number: int) -> None:
    """Send ``number`` to a client, which may have ended."""
    with contextlib.suppress(OSError):
        control.send(str(number).encode().ljust(NUMBER))


def _serve_and_end(connection: Connection, log: int) -> None:
    """Serve one client in a child process, then end the process."""
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        serve(connection)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)  # the exit handlers of the parent must not run in the child


def main() -> None:
    """Listen on the socket passed as standard input."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    runtime.leave_out_exir()
    runtime.start()
    torch.set_num_threads(1)  # a fork does not copy the other threads of a process
    requests = socket.socket(fileno=os.dup(0))
    os.dup2(1, 0)  # programs must not read requests
    listen(requests)


if __name__ == "__main__":
    main()
