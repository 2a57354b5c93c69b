"""Atomic writing of files."""

from __future__ import annotations

import os
from pathlib import Path

from quantflow.errors import QuantflowError


def write_atomically(path: str | os.PathLike[str], data: bytes, *, stage: str) -> Path:
    """Write ``data`` to a temporary file and rename it to ``path``, so that readers never see a partial file.

    Raises:
        QuantflowError: at ``stage``, if the folder is missing or not writable; ``path`` is unchanged.
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
