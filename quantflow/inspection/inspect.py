"""The verb that says what a ``.pte`` is, of this project or from anywhere, without trusting it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from quantflow.errors import QuantflowError
from quantflow.inspection.pte import SIGNATURE_METHOD, Contents, Method, read
from quantflow.inspection.quarantine import in_quarantine


@dataclass(frozen=True)
class Inspection:
    """What a ``.pte`` holds, and whether the runtime takes it.

    Attributes:
        name: The file.
        contents: Its methods, operators, delegates and memory.
        refused: By method, why the runtime does not load it or run it on zeros; empty where all is well, None where it was
            not tried.
    """

    name: str
    contents: Contents
    refused: dict[str, str] | None

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
        return json.dumps({**held, "signature": self.ours, "methods": methods, "refused": self.refused}, indent=2)

    def __str__(self) -> str:
        inside = self.contents.program_size
        origin = "quantflow" if self.ours else "elsewhere"
        lines = [f"{self.name}: {self.contents.size:,} bytes ({inside:,} of them the program), made by {origin}"]
        for method in self.methods:
            lines += _describe(method)
            if self.refused is not None:
                why = self.refused.get(method.name, "")
                lines.append(f"    runtime   {'does not take it: ' + why if why else 'loads and runs it on zeros'}")
        return "\n".join(lines)


def _describe(method: Method) -> list[str]:
    lines = [f"  {method.name}"]
    lines += [f"    takes     {given}" for given in method.inputs]
    lines += [f"    returns   {returned}" for returned in method.outputs]
    lines += [f"    delegate  {count} calls of {name}" for name, count in method.delegates.most_common()]
    lines += [f"    kernel    {count} calls of {name}" for name, count in method.kernels.most_common()]
    planned = " + ".join(f"{size:,}" for size in method.planned_bytes)
    return [*lines, f"    memory    {planned} bytes planned"] if planned else lines


def inspect(source: str | os.PathLike[str] | bytes, *, load: bool = True) -> Inspection:
    """What a ``.pte`` holds. Its bytes are read in plain Python, and loaded only in a process of their own.

    Args:
        source: A path, or the bytes of a ``.pte``.
        load: Also load each method and run it on zeros, in that process; False only reads.

    Raises:
        QuantflowError: at stage ``"runtime"``, for what can't be read, is no whole program, or crashes the runtime.
    """
    name, buffer = ("<bytes>", source) if isinstance(source, bytes) else (str(source), file_bytes(source))
    try:
        contents = read(buffer)
    except QuantflowError as error:
        raise QuantflowError(error.stage, error.reason, node=name, remedy=error.remedy) from error
    if not load:
        return Inspection(name, contents, None)
    found = in_quarantine("loads", buffer, node=name)
    return Inspection(name, contents, {method: why for method, why in found.items() if why})


def file_bytes(path: str | os.PathLike[str]) -> bytes:
    """The bytes of the file ``path``.

    Raises:
        QuantflowError: at stage ``"runtime"``, when it can't be read.
    """
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise QuantflowError("runtime", f"can't read: {error}", node=str(path), remedy="name a .pte file") from error
