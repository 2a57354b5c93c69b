"""The JSON that a benchmark leaves: its rows, and the settings and the machine that they were measured with."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch


def write_record(path: Path, options: argparse.Namespace, rows: Any) -> None:
    """Write ``rows`` to ``path``. Of a path among ``options`` the last name is kept: the rest is the machine's own."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    settings = {name: value for name, value in vars(options).items() if value != path}
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "machine": machine, "rows": rows}
    path.write_text(json.dumps(record, indent=2, default=lambda folder: folder.name) + "\n")
