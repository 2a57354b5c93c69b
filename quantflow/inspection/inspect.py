"""The ``inspect`` function, which describes any ``.pte`` file without trusting it."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass, field

from quantflow.errors import QuantflowError
from quantflow.inspection.bounds import memory
from quantflow.inspection.quarantine import in_quarantine
from quantflow.pte import SIGNATURE_METHOD, Contents, Method, read


@dataclass(frozen=True)
class Inspection:
    """What a ``.pte`` holds, and whether the runtime loads and runs it.

    Attributes:
        name: The path of the file, or ``"<bytes>"``.
        contents: Its methods, operators, delegates and memory.
        refused: By method, why the runtime does not load it or run it on zeros. Empty where the runtime runs all of them;
            None where that was not tried.
        not_run: By method, why one that loads was not run: no inputs can be made for it.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> edge = qf.export(torch.nn.Linear(8, 4).eval(), (torch.randn(1, 8),)).to_core_aten().to_edge()
        >>> inspection = qf.inspect(edge.to_executorch().buffer, load=False)
        >>> [(method.name, str(method.inputs[0])) for method in inspection.methods]
        [('forward', 'float32[1, 8]')]
    """

    name: str
    contents: Contents
    refused: dict[str, str] | None
    not_run: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether the file carries a signature of this project: names and structure of inputs and outputs."""
        return SIGNATURE_METHOD in self.contents.methods

    @property
    def methods(self) -> list[Method]:
        """The methods, without the one that carries the signature."""
        return [m for m in self.contents.methods.values() if m.name != SIGNATURE_METHOD]

    def to_json(self) -> str:
        """Return all figures as a JSON object."""
        methods = [
            {
                "name": method.name,
                "inputs": [str(t) for t in method.inputs],
                "outputs": [str(t) for t in method.outputs],
                "delegates": dict(method.delegates),
                "kernels": dict(method.kernels),
                "planned_bytes": list(method.planned_bytes),
            }
            for method in self.methods
        ]
        held = {"name": self.name, "bytes": self.contents.size, "program_bytes": self.contents.program_size}
        tried = {"refused": self.refused, "not_run": self.not_run}
        return json.dumps({**held, "signature": self.ours, "methods": methods, **tried}, indent=2)

    def __str__(self) -> str:
        inside = self.contents.program_size
        origin = "quantflow" if self.ours else "elsewhere"
        lines = [f"{self.name}: {self.contents.size:,} bytes ({inside:,} of them the program), made by {origin}"]
        for method in self.methods:
            lines += _describe(method)
            if self.refused is not None:
                lines.append(f"    runtime   {self._tried(method.name)}")
        return "\n".join(lines)

    def _tried(self, method: str) -> str:
        if self.refused and method in self.refused:
            return f"does not take it: {self.refused[method]}"
        if method in self.not_run:
            return f"loaded, not run: {self.not_run[method]}"
        return "loads and runs it on zeros"


def _describe(method: Method) -> list[str]:
    lines = [f"  {method.name}"]
    lines += [f"    takes     {given}" for given in method.inputs]
    lines += [f"    returns   {returned}" for returned in method.outputs]
    lines += [f"    delegate  {count} calls of {name}" for name, count in method.delegates.most_common()]
    lines += [f"    kernel    {count} calls of {name}" for name, count in method.kernels.most_common()]
    planned = " + ".join(f"{size:,}" for size in method.planned_bytes)
    return [*lines, f"    memory    {planned} bytes planned"] if planned else lines


def inspect(source: str | os.PathLike[str] | bytes, *, load: bool = True, seconds: float = 300.0) -> Inspection:
    """Read what a ``.pte`` holds, in plain Python; only a separate process loads and runs it.

    Args:
        source: A path, or the bytes of a ``.pte``.
        load: Also load each method and run it on zeros, in that process, within the memory that a program of its size and plan
            needs; False only reads.
        seconds: The most seconds that the process may take.

    Returns:
        The contents, and what the runtime refused.

    Raises:
        QuantflowError: at stage ``"runtime"``, for what can't be read, is no whole program, crashes the runtime or does
            not end.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> edge = qf.export(torch.nn.Linear(8, 4).eval(), (torch.randn(1, 8),)).to_core_aten().to_edge()
        >>> inspection = qf.inspect(edge.to_executorch().buffer)
        >>> inspection.ours, inspection.refused
        (True, {})
    """
    if isinstance(source, bytes):
        return inspect_bytes(source, "<bytes>", load=load, seconds=seconds)
    return inspect_bytes(file_bytes(source), str(source), load=load, seconds=seconds)


def inspect_bytes(buffer: bytes, name: str, *, load: bool = True, seconds: float = 300.0) -> Inspection:
    """Inspect the bytes of a ``.pte`` called ``name``, as :func:`inspect` does."""
    try:
        contents = read(buffer)
    except QuantflowError as error:
        raise QuantflowError(error.stage, error.reason, node=name, remedy=error.remedy) from error
    if not load:
        return Inspection(name, contents, None)
    return Inspection(name, contents, **in_quarantine("loads", buffer, node=name, seconds=seconds))


def file_bytes(path: str | os.PathLike[str]) -> bytes:
    """Return the bytes of the file ``path``.

    Raises:
        QuantflowError: at stage ``"runtime"``, when it can't be read, is a device, or does not fit into memory.
    """
    remedy = "name a .pte file"
    try:
        with open(path, "rb") as file:
            kind = os.fstat(file.fileno())
            if stat.S_ISCHR(kind.st_mode) or stat.S_ISBLK(kind.st_mode):
                raise QuantflowError("runtime", "can't read: a device", node=str(path), remedy=remedy)
            if kind.st_size > memory():
                reason = f"can't read: {kind.st_size:,} bytes, more than this machine has memory"
                raise QuantflowError("runtime", reason, node=str(path), remedy=remedy)
            return file.read()
    except (OSError, MemoryError) as error:
        raise QuantflowError("runtime", f"can't read: {error}", node=str(path), remedy=remedy) from error
