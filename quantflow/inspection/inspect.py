"""The verb that says what a ``.pte`` is, of this project or from anywhere, without trusting it."""

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
    """What a ``.pte`` holds, and whether the runtime takes it.

    Attributes:
        name: The file.
        contents: Its methods, operators, delegates and memory.
        refused: By method, why the runtime does not load it or run it on zeros; empty where all is well, None where it was
            not tried.
        not_run: By method, why one that loads was not run: no inputs can be made for it.
    """

    name: str
    contents: Contents
    refused: dict[str, str] | None
    not_run: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> bool:
        """Whether it carries a signature of this project: names and structure of inputs and outputs."""
        return SIGNATURE_METHOD in self.contents.methods

    @property
    def methods(self) -> list[Method]:
        """Its methods, but for the one that carries the signature."""
        return [m for m in self.contents.methods.values() if m.name != SIGNATURE_METHOD]

    def to_json(self) -> str:
        """All of it, as a JSON object."""
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
    """What a ``.pte`` holds. Its bytes are read in plain Python, and loaded only in a process of their own.

    Args:
        source: A path, or the bytes of a ``.pte``.
        load: Also load each method and run it on zeros, in that process, within the memory that a program of its size and plan
            needs; False only reads.
        seconds: How long that may take.

    Raises:
        QuantflowError: at stage ``"runtime"``, for what can't be read, is no whole program, crashes the runtime or does
            not end.
    """
    if isinstance(source, bytes):
        return inspect_bytes(source, "<bytes>", load=load, seconds=seconds)
    return inspect_bytes(file_bytes(source), str(source), load=load, seconds=seconds)


def inspect_bytes(buffer: bytes, name: str, *, load: bool = True, seconds: float = 300.0) -> Inspection:
    """As :func:`inspect`, of the bytes of a ``.pte`` that is called ``name``."""
    try:
        contents = read(buffer)
    except QuantflowError as error:
        raise QuantflowError(error.stage, error.reason, node=name, remedy=error.remedy) from error
    if not load:
        return Inspection(name, contents, None)
    return Inspection(name, contents, **in_quarantine("loads", buffer, node=name, seconds=seconds))


def file_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of the file ``path``.

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
