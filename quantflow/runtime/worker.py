"""The other side of :mod:`quantflow.runtime.isolated`: a server that forks a child for each client that has programs to run.

The server has the runtime loaded and no other thread, so a child is there at once, also in place of one that crashed.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import sys
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import torch
from safetensors.torch import load, save

from quantflow import runtime
from quantflow.errors import QuantflowError
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


def listen(listening: socket.socket, owner: socket.socket) -> None:
    """Take clients until the owner is gone, who holds the other end of ``owner`` and never writes to it.

    A client says ``run`` and hands over the file for the log, and is told the number of the process that serves it; or it says
    ``wait`` and such a number, and is told how that process ended.
    """
    ended: dict[int, int] = {}  # exit codes of children whose clients have not asked
    while owner not in select.select([listening, owner], [], [])[0]:
        client, _ = listening.accept()
        ended.update(_reaped())
        with client:
            word, files, _, _ = socket.recv_fds(client, 64, 1)
            command, _, number = word.decode().partition(" ")
            if command == "wait":
                child = int(number)
                code = ended.pop(child) if child in ended else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                client.sendall(str(code).encode())
                continue
            if child := os.fork():
                os.close(files[0])
                client.sendall(str(child).encode().ljust(16))
                continue
            listening.close()
            owner.close()
            _serve_and_end(Connection(os.dup(client.fileno())), files[0])


def _reaped() -> Iterator[tuple[int, int]]:
    """The children that have ended, each with its exit code."""
    with contextlib.suppress(ChildProcessError):  # there are none
        while (found := os.waitpid(-1, os.WNOHANG))[0]:
            yield found[0], os.waitstatus_to_exitcode(found[1])


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
    """Listen on the sockets that the command line names."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    runtime.leave_out_exir()
    runtime.start()
    torch.set_num_threads(1)  # a thread of the parent would be missing in its children
    listen(*(socket.socket(fileno=int(number)) for number in sys.argv[1:3]))


if __name__ == "__main__":
    main()
