"""The end of the road: a serialised ExecuTorch program, callable on the runtime."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from quantflow import runtime
from quantflow.delegates.delegation import Delegation
from quantflow.errors import QuantflowError
from quantflow.files import write_atomically
from quantflow.signature import DynamicDim, Input, Signature

# The constant method in which a program carries its signature (JSON).
SIGNATURE_METHOD = "quantflow_signature"

# The runtime names dtypes by their number in c10::ScalarType.
_SCALAR_TYPES = {
    0: "uint8",
    1: "int8",
    2: "int16",
    3: "int32",
    4: "int64",
    5: "float16",
    6: "float32",
    7: "float64",
    11: "bool",
    15: "bfloat16",
}


@dataclass(frozen=True)
class Program:
    """A memory-planned program: ``program(x)`` runs it on the ExecuTorch runtime and returns the model's own structure.

    Attributes:
        buffer: The bytes of the ``.pte``.
        signature: What it takes and returns; for a program from elsewhere, what the runtime tells of it.
        delegation: What its delegates run; None for a program loaded from a file.
    """

    buffer: bytes = field(repr=False)
    signature: Signature
    delegation: Delegation | None = None

    @classmethod
    def from_buffer(cls, buffer: bytes) -> Program:
        """The program that ``buffer``, the bytes of a ``.pte``, holds."""
        program = runtime.load_program(buffer)
        if SIGNATURE_METHOD not in program.method_names:
            return cls(buffer, _signature_from_runtime(program))
        text = runtime.execute(runtime.load_method(program, SIGNATURE_METHOD), SIGNATURE_METHOD, [])[0]
        return cls(buffer, Signature.from_json(text))

    @cached_property
    def _program(self) -> Any:
        return runtime.load_program(self.buffer)

    @cached_property
    def _forward(self) -> Any:
        if "forward" not in self._program.method_names:
            remedy = f"it has {', '.join(self.methods)}"
            raise QuantflowError("runtime", "the program has no such method", node="forward", remedy=remedy)
        return runtime.load_method(self._program, "forward")

    def load(self) -> None:
        """Load ``forward`` into the runtime now, not at the first call.

        Raises:
            QuantflowError: at stage ``"runtime"``, when a delegate or kernel refuses it.
        """
        _ = self._forward

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of its methods."""
        return tuple(sorted(self._program.method_names - {SIGNATURE_METHOD}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` on the runtime.

        Raises:
            QuantflowError: at stage ``"runtime"``, before the runtime sees them, when the inputs differ from the
                signature in structure, count, dtype or shape.
        """
        flat = self.signature.flatten(args, kwargs, stage="runtime")
        # The runtime reads memory as contiguous, whatever the strides say.
        flat = [t.detach().cpu().contiguous() if isinstance(t, torch.Tensor) else t for t in flat]
        return self.signature.unflatten(runtime.execute(self._forward, "forward", flat))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the ``.pte`` to ``path``, whole or not at all."""
        return write_atomically(path, self.buffer, stage="executorch")

    def __repr__(self) -> str:
        outside = f"; {str(self.delegation).splitlines()[0]}" if self.delegation else ""
        return f"Program({len(self.buffer):,} bytes; inputs: {self.signature.describe_inputs()}{outside})"


def load(path: str | os.PathLike[str]) -> Program:
    """Read a ``.pte``, of this project or from elsewhere.

    Raises:
        QuantflowError: at stage ``"runtime"``, when it can't be read or is no whole program.
    """
    try:
        return Program.from_buffer(Path(path).read_bytes())
    except OSError as error:
        raise QuantflowError("runtime", f"can't read: {error}", node=str(path), remedy="name a .pte file") from error
    except QuantflowError as error:
        raise QuantflowError(error.stage, error.reason, node=str(path), remedy=error.remedy) from error


def _signature_from_runtime(program: Any) -> Signature:
    if "forward" not in program.method_names:
        return Signature(())
    meta = program.metadata("forward")
    inputs = []
    for i in range(meta.num_inputs()):
        try:
            tensor = meta.input_tensor_meta(i)
        except RuntimeError:  # an input that is no tensor
            inputs.append(Input(f"input_{i}"))
            continue
        # The runtime tells upper bounds only, not which dimensions may be smaller.
        shape = tuple(DynamicDim(f"input_{i}_{j}", 0, size) for j, size in enumerate(tensor.sizes()))
        inputs.append(Input(f"input_{i}", _SCALAR_TYPES.get(tensor.dtype(), "float32"), shape))
    return Signature(tuple(inputs))
