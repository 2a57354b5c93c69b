"""Writing files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from quantflow.errors import QuantflowError


def write_atomically(path: str | os.PathLike[str], data: bytes, *, stage: str) -> Path:
    """Write ``data`` to ``path`` through a file beside it, so that no reader ever sees half of it.

    Raises:
        QuantflowError: at ``stage``, when the folder is missing or can't be written to; ``path`` is as it was.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        remedy = "name a file in a folder that exists and can be written to"
        raise QuantflowError(stage, f"can't write: {error}", node=str(path), remedy=remedy) from error
    return path
