"""The other side of :mod:`quantflow.runtime.isolated`: a process that runs the programs that it is sent."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from multiprocessing.connection import Connection
from typing import Any

import torch
from safetensors.torch import load, save

from quantflow import runtime
from quantflow.errors import QuantflowError
from quantflow.runtime.in_process import missing_kernels

IDLE = 300.0  # seconds without a program, after which the process ends


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


def main() -> None:
    """Serve the file descriptor that the command line names."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(2, 1)  # what native code prints belongs to the log
    runtime.leave_out_exir()
    runtime.start()
    serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    main()
