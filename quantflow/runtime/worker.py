"""The other side of :mod:`quantflow.runtime.isolated`: a server that forks a child for each client that has programs to run.

The server has the runtime loaded and no other thread, so a child is there at once, also in place of one that crashed. A child
ends when its client does, and the server when the last process that could ask it does.
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

IDLE = 300.0  # seconds without a program, after which a child ends


def encode(values: list[list[Any]]) -> tuple[bytes, bytes]:
    """Lists of tensors, numbers, texts and None: as JSON that names tensors, and the tensors."""
    tensors: dict[str, torch.Tensor] = {}

    def told(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return {"value": value}
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}

    text = json.dumps([[told(value) for value in row] for row in values])
    return text.encode(), save(tensors)


def decode(text: bytes, blob: bytes) -> list[list[Any]]:
    """What :func:`encode` was given."""
    tensors = load(blob)
    return [[tensors[v["tensor"]] if "tensor" in v else v["value"] for v in row] for row in json.loads(text)]


def serve(connection: Connection) -> None:
    """Run programs until the connection ends or nothing comes for a while.

    Each is sent as three messages: its bytes, and the inputs of its calls as :func:`encode` has them. Answered by a message of
    JSON and the outputs of the calls that ran.
    """
    while connection.poll(IDLE):
        try:
            buffer, text, blob = (connection.recv_bytes() for _ in range(3))
        except EOFError:
            return
        outputs: list[list[Any]] = []
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


def _own(value: Any) -> Any:
    """``value`` in memory of its own: the next call writes into that of the runtime."""
    return value.clone() if isinstance(value, torch.Tensor) else value


@dataclass(frozen=True)
class _Child:
    """A process that serves one client.

    Attributes:
        pid: Its number.
        control: Tells the client how the child ended; that the client is gone, or wants it ended, is the end of what it reads.
        life: Ends when the child does.
    """

    pid: int
    control: socket.socket
    life: Connection

    def end(self, ready: Sequence[Any]) -> bool:
        """End it, where the client is ``ready``; whether it has ended."""
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
    """Fork a child for each of the ``requests``, until nobody is left who could make one.

    A request is one byte and three files: the ``control`` of the child, the connection that it serves, and its log. It is
    answered by the number of the child, 0 for none; then, once the child has ended, by its exit code.
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
    """A child for the client that sent ``files``, without what the server ``held``; None where there can't be one."""
    if len(files) < 3:  # no more can be open
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
    """Send ``number`` to a client, which may be gone."""
    with contextlib.suppress(OSError):
        control.send(str(number).encode().ljust(NUMBER))


def _serve_and_end(connection: Connection, log: int) -> None:
    """Serve one client, in a child of this process, which ends with it."""
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
        os._exit(code)  # nothing of the parent's is to be ended twice


def main() -> None:
    """Listen on the socket that is the standard input."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    runtime.leave_out_exir()
    runtime.start()
    torch.set_num_threads(1)  # a thread of the parent would be missing in its children
    requests = socket.socket(fileno=os.dup(0))
    os.dup2(1, 0)  # a program has no part in them
    listen(requests)


if __name__ == "__main__":
    main()
