"""The output of the recipes: the folder, ``result.json`` and the printed table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from quantflow import QuantflowError
from quantflow.files import write_atomically


def output_folder(path: Path) -> Path:
    """Create the folder ``path`` if it is missing, and check that it is writable.

    Raises:
        QuantflowError: at stage ``"recipe"``, if the folder is not writable.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / ".writable", b"", stage="recipe").unlink(missing_ok=True)  # or another process did
    except (OSError, QuantflowError) as error:
        remedy = "name a folder that you can write to"
        raise QuantflowError("recipe", f"can't write: {error}", node=f"--output {path}", remedy=remedy) from error
    return path


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write ``result.json`` and print it as a table with rounded figures."""
    result = {name: round(value, 6) if isinstance(value, float) else value for name, value in result.items()}
    write_atomically(folder / "result.json", (json.dumps(result, indent=2) + "\n").encode(), stage="recipe")
    print()
    print_table((name, value) for name, value in result.items() if not isinstance(value, (dict, list)))
    print(f"\nwritten: {folder / 'model.pte'}, {folder / 'result.json'}")


def print_table(rows: Iterable[tuple[str, Any]]) -> None:
    """Print names and figures in two columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
        print(f"{name:<{width}}  {shown:>14}")
