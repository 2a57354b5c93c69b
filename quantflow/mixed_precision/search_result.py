"""The result of a search: the precision of each layer, the predicted and the built program."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from quantflow.metrics import decibels
from quantflow.mixed_precision.choices import Choice, Table
from quantflow.pictures import new_figure, save
from quantflow.pipeline.result import Result


@dataclass(frozen=True)
class SearchResult:
    """Mixed precision under a limit, as :func:`quantflow.search` returns it; ``print`` shows the table.

    Attributes:
        result: The program that was built, as :func:`quantflow.quantize` returns it.
        chosen: The choice for each layer: ``layer``, ``precision``, ``noise`` (in units of the outputs' power), ``size``
            (bytes) and ``time`` (milliseconds).
        table: All choices, with the noise, bytes and milliseconds measured for each.
        frontier: The best choices for other sizes, the smallest first.
        ms: The median of a call of the program, milliseconds; None where latency was not limited.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64)).eval()
        >>> x, data = torch.randn(1, 64), [torch.randn(8, 64)]
        >>> found = qf.search(model, (x,), data, max_bytes=50_000, recover=False, progress=False)
        >>> sizes = [size for size, sqnr in found.points()]
        >>> sizes == sorted(sizes)
        True
    """

    result: Result = field(repr=False)
    chosen: tuple[Choice, ...]
    table: Table = field(repr=False)
    frontier: tuple[tuple[Choice, ...], ...] = field(repr=False)
    ms: float | None = None

    def points(self) -> list[tuple[int, float]]:
        """Return the predicted bytes and signal to noise (dB) of each choice on the frontier."""
        totals = (self.table.total(chosen) for chosen in self.frontier)
        return [(size, decibels(1.0, noise)) for noise, size, _ in totals]

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the frontier and the choice that was made.

        Args:
            path: The image file; its extension says which format.

        Returns:
            The path of the file.

        Raises:
            QuantflowError: at stage ``"search"``, without matplotlib, or where the file can't be written.
        """
        figure = new_figure("search", 6, 4)
        axes = figure.subplots()
        points = [(size / 1000, sqnr) for size, sqnr in self.points() if math.isfinite(sqnr)]
        axes.step(*zip(*points, strict=True), where="post", marker="o", label="best for its size")
        noise, size, _ = self.table.total(self.chosen)
        axes.plot([size / 1000], [decibels(1.0, noise)], marker="*", markersize=14, linestyle="", label="chosen")
        axes.set_xlabel("predicted size of the .pte, kB")
        axes.set_ylabel("predicted signal to noise, dB")
        axes.legend()
        return save(figure, path, "search")

    def to_json(self) -> str:
        """Return the choices, the table and the frontier as a JSON object."""
        noise, size, time = self.table.total(self.chosen)
        record: dict[str, object] = {
            "precisions": {c.layer: c.precision for c in self.chosen},
            "predicted": {"noise": noise, "bytes": size, "ms": time},
            "bytes": len(self.result.program.buffer),
            "ms": self.ms,
            "table": asdict(self.table),
            "frontier": [{c.layer: c.precision for c in chosen} for chosen in self.frontier],
        }
        return json.dumps(record, indent=2)

    def __str__(self) -> str:
        width = max(len(c.layer) for c in self.chosen)
        lines = [f"{c.layer:<{width}}  {c.precision:<8}  {decibels(1.0, c.noise):>6.1f} dB" for c in self.chosen]
        noise, size, time = self.table.total(self.chosen)
        predicted = f"predicted: {decibels(1.0, noise):.1f} dB, {size:,} bytes, {time:.3f} ms"
        built = f"built: {len(self.result.program.buffer):,} bytes"
        return "\n".join([*lines, predicted, built if self.ms is None else f"{built}, {self.ms:.3f} ms"])
