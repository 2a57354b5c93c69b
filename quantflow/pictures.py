"""Pictures of results, drawn with matplotlib where that is installed."""

from __future__ import annotations

from typing import Any

from quantflow.errors import QuantflowError


def new_figure(stage: str, width: float, height: float) -> Any:
    """An empty ``matplotlib.figure.Figure`` of so many inches, which no window shows.

    Raises:
        QuantflowError: at ``stage``, without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        remedy = "pip install 'quantflow[plots]'"
        raise QuantflowError(stage, "pictures need matplotlib", node="plot", remedy=remedy) from error
    return Figure(figsize=(width, height), layout="constrained")
