"""The JSON record of a benchmark: its rows, its settings and the machine."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch


def write_record(path: Path, options: argparse.Namespace, rows: Any) -> None:
    """Write ``rows`` to ``path``. Paths among ``options`` are reduced to their last name."""
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
    settings = {name: value for name, value in vars(options).items() if value != path}
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"settings": settings, "machine": machine, "rows": rows}
    path.write_text(json.dumps(record, indent=2, default=lambda folder: folder.name) + "\n")
