"""The final stage: a serialized ExecuTorch program that runs on the runtime."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from quantflow import pte, runtime
from quantflow.delegates.delegation import Delegation
from quantflow.errors import QuantflowError
from quantflow.files import write_atomically
from quantflow.pte import SIGNATURE_METHOD
from quantflow.signature.signature import DynamicDim, Input, Signature


@dataclass(frozen=True)
class Program:
    """A memory-planned program: ``program(x)`` runs it on the ExecuTorch runtime and returns the model's own structure.

    Attributes:
        buffer: The bytes of the ``.pte``.
        signature: The names, dtypes, shapes and structure of its inputs and outputs; for a program from elsewhere, the
            dtypes and shapes that the file holds.
        delegation: Which operators its delegates run; None for a program read from a file or from bytes.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.ReLU()).eval()
        >>> x = torch.randn(1, 8)
        >>> program = qf.export(model, (x,)).to_core_aten().to_edge("xnnpack").to_executorch()
        >>> torch.allclose(program(x), model(x), atol=1e-4)
        True
        >>> program.delegation.calls
        1
    """

    buffer: bytes = field(repr=False)
    signature: Signature
    delegation: Delegation | None = None

    @classmethod
    def from_buffer(cls, buffer: bytes) -> Program:
        """Read a program from the bytes of a ``.pte``.

        A malformed file is refused. A file that was made to crash the runtime crashes it: examine a file from an unknown source
        with :func:`quantflow.inspect` first.

        Args:
            buffer: The bytes of a ``.pte``.

        Returns:
            The program.

        Raises:
            QuantflowError: at stage ``"runtime"``, when the bytes are no whole program or their signature can't be read.
        """
        contents = pte.read(buffer)
        runtime.load_program(buffer)
        if SIGNATURE_METHOD not in contents.methods:
            return cls(buffer, _flat_signature(contents))
        try:
            return cls(buffer, Signature.from_json(contents.methods[SIGNATURE_METHOD].text or ""))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            reason = f"its signature can't be read: {type(error).__name__}: {error}"
            raise QuantflowError("runtime", reason, node=SIGNATURE_METHOD, remedy="lower it again") from error

    @cached_property
    def _program(self) -> Any:
        return runtime.load_program(self.buffer)

    @cached_property
    def _forward(self) -> Any:
        if "forward" not in self._program.method_names:
            remedy = f"it has {', '.join(self.methods)}"
            raise QuantflowError("runtime", "the program has no such method", node="forward", remedy=remedy)
        return runtime.load_method(self._program, "forward", self.buffer)

    def load(self) -> None:
        """Load ``forward`` into the runtime now, not at the first call.

        Raises:
            QuantflowError: at stage ``"runtime"``, when a delegate or kernel refuses it, or there is no ``forward``.
        """
        _ = self._forward

    def reset(self) -> None:
        """Let the next call begin in the first state: what the network writes (a cache, for one) is as it was lowered."""
        # The methods that a loaded program gives share its memory.
        for loaded in ("_forward", "_program"):
            self.__dict__.pop(loaded, None)

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of its methods, without the one that carries the signature."""
        return tuple(sorted(self._program.method_names - {SIGNATURE_METHOD}))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run ``forward`` on the runtime.

        Inputs that the model writes to are changed as the model changes them. State goes on from call to call, until
        :meth:`reset`.

        Args:
            args: Positional inputs, of the dtypes and shapes of the signature.
            kwargs: Keyword inputs.

        Returns:
            The outputs, in the model's own structure; the tensors lie on the CPU.

        Raises:
            QuantflowError: at stage ``"runtime"``, before the runtime sees them, when the inputs differ from the
                signature in structure, count, dtype or shape.
        """
        flat = self.signature.flatten(args, kwargs, stage="runtime")
        # The runtime reads memory as contiguous, whatever the strides say.
        given = [t.detach().cpu().contiguous() if isinstance(t, torch.Tensor) else t for t in flat]
        found = runtime.execute(self._forward, "forward", given)
        return self.signature.unflatten(self.signature.write_back(flat, found))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the ``.pte`` to a file, whole or not at all.

        Args:
            path: The file.

        Returns:
            The path of the file.

        Raises:
            QuantflowError: at stage ``"executorch"``, when the file can't be written.
        """
        return write_atomically(path, self.buffer, stage="executorch")

    def __repr__(self) -> str:
        outside = f"; {str(self.delegation).splitlines()[0]}" if self.delegation else ""
        return f"Program({len(self.buffer):,} bytes; inputs: {self.signature.describe_inputs()}{outside})"


def load(path: str | os.PathLike[str]) -> Program:
    """Read a ``.pte``, of this project or from elsewhere.

    Args:
        path: The file.

    Returns:
        The program. Of a file from elsewhere the inputs are known by dtype and shape only.

    Raises:
        QuantflowError: at stage ``"runtime"``, when the file can't be read or is no whole program.

    Example:
        >>> import os, tempfile, torch
        >>> import quantflow as qf
        >>> x = torch.randn(1, 8)
        >>> edge = qf.export(torch.nn.Linear(8, 4).eval(), (x,)).to_core_aten().to_edge()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = edge.to_executorch().save(os.path.join(folder, "model.pte"))
        ...     print(tuple(qf.load(path)(x).shape))
        (1, 4)
    """
    try:
        return Program.from_buffer(Path(path).read_bytes())
    except OSError as error:
        raise QuantflowError("runtime", f"can't read: {error}", node=str(path), remedy="name a .pte file") from error
    except QuantflowError as error:
        raise QuantflowError(error.stage, error.reason, node=str(path), remedy=error.remedy) from error


def _flat_signature(contents: pte.Contents) -> Signature:
    if "forward" not in contents.methods:
        return Signature(())
    inputs = []
    for i, given in enumerate(contents.methods["forward"].inputs):
        # A file gives only upper bounds and does not show which dimensions may be smaller.
        sizes = (DynamicDim(f"input_{i}_{j}", 0, size) for j, size in enumerate(given.shape))
        inputs.append(Input(f"input_{i}", given.dtype, tuple(sizes if given.dynamic else given.shape)))
    return Signature(tuple(inputs))
