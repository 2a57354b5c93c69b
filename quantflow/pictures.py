"""Plots of results with matplotlib, an optional dependency."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

from quantflow.errors import QuantflowError
from quantflow.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(stage: str, width: float, height: float) -> Figure:
    """An empty ``matplotlib.figure.Figure`` of this size in inches, without a window.

    Raises:
        QuantflowError: at ``stage``, if matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = "pip install 'quantflow[plots]'"
        raise QuantflowError(stage, "pictures need matplotlib", node="plot", remedy=remedy) from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure: Figure, path: str | os.PathLike[str], stage: str) -> Path:
    """Write ``figure`` atomically to an image file, in the format of the suffix.

    Raises:
        QuantflowError: at ``stage``, for a suffix that matplotlib does not support, or if the file can't be written.
    """
    kind = Path(path).suffix.removeprefix(".") or "png"
    drawn = io.BytesIO()
    try:
        figure.savefig(drawn, format=kind)
    except ValueError as error:
        raise QuantflowError(
            stage, str(error), node=str(path), remedy="an ending such as .png, .svg or .pdf"
        ) from error
    return write_atomically(path, drawn.getvalue(), stage=stage)
