"""Initial values of the buffers that a program writes. executorch starts them at zero unless a node asks for their value."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.export import ExportedProgram

_INITIALISED = "et_init_buffer"  # node.meta of a placeholder: executorch's emitter writes the buffer's value


@contextlib.contextmanager
def lowering_state(manager: Any) -> Iterator[None]:
    """Make ``to_executorch`` of an ``executorch.exir.EdgeProgramManager`` keep the initial values of each nonzero buffer that a
    method writes.
    """
    for name in manager.methods:
        program = manager.exported_program(name)
        signature = program.graph_signature
        written = set(signature.buffers_to_mutate.values())
        for node in program.graph.find_nodes(op="placeholder"):
            buffer = signature.inputs_to_buffers.get(node.name)
            if buffer in written and _holds_anything(_buffer(program, buffer)):
                node.meta[_INITIALISED] = True
    # State is copied into the buffers, which autograd treats as parameters.
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Mutation on a buffer", category=UserWarning)
        yield


def _buffer(program: ExportedProgram, name: str) -> torch.Tensor:
    return program.state_dict[name] if name in program.state_dict else program.constants[name]


def _holds_anything(buffer: torch.Tensor) -> bool:
    return bool((buffer != 0).any())
