"""What a diagnosis says: the layers, those with the least probable errors first."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from quantflow.analysis.error_statistics import Sums, decibel, finite
from quantflow.text_table import aligned


@dataclass(frozen=True)
class LayerErrors:
    """The errors of one layer of a quantized network: of an operator's output, on its grid.

    Attributes:
        node: The name of its node in the quantized graph.
        layer: The module that it was traced from; ``""`` for the model itself.
        operator: What it computes.
        excess: By how much the error that it adds exceeds what a grid of as many levels over the same values and weights must
            cost, dB. About 0 for a layer that is right.
        local: Signal to noise of its output, from float inputs through its own quantized weights and ranges, dB.
        accumulated: Signal to noise of its output within the quantized network, dB.
        effect: Signal to noise of the network's outputs if it alone were quantized, to first order, dB; None where there is no
            gradient.
        saturated: The share of its float values that lie beyond its grid; None without a grid fixed ahead.
        range_use: The width of its float values' range over that of its grid; None without a grid fixed ahead.
        histogram: How many float values lie below the grid, in each sixteenth of it, and above it.
        channels: Signal to noise of each channel, dB, from float inputs.
    """

    node: str
    layer: str
    operator: str
    excess: float
    local: float
    accumulated: float
    effect: float | None
    saturated: float | None
    range_use: float | None
    histogram: tuple[int, ...]
    channels: tuple[float, ...]

    @classmethod
    def of(cls, names: tuple[str, str, str], sums: Sums, outputs: int, grid: tuple[float, float] | None) -> LayerErrors:
        """From the sums over the data, the number of elements of the outputs for each example, and the ends of the grid."""
        local, signal = sums.channels
        noisy = [_sqnr(float(s), float(n)) for s, n in zip(signal, local, strict=True)]
        width = max(sums.high, 0.0) - min(sums.low, 0.0)
        return cls(
            *names,
            excess=sums.excess,
            local=_sqnr(sums.signal, sums.local),
            accumulated=_sqnr(sums.signal, sums.accumulated),
            effect=_sqnr(float(outputs), sums.effect / sums.examples) if sums.examples else None,
            saturated=None if grid is None else sums.beyond / max(sums.count, 1),
            range_use=None if grid is None else width / max(grid[1] - grid[0], 1e-300),
            histogram=() if grid is None else tuple(sums.histogram.tolist()),
            channels=tuple(noisy),
        )

    def worst_channels(self, count: int = 3) -> tuple[tuple[int, float], ...]:
        """The channels with the least signal to noise, each with it, dB."""
        order = sorted(range(len(self.channels)), key=lambda c: self.channels[c])
        return tuple((c, self.channels[c]) for c in order[:count])


@dataclass(frozen=True)
class Diagnosis:
    """Where a quantized network departs from its float network. ``print`` shows the table.

    Layers are ranked by :attr:`LayerErrors.excess`: a fault is an error that a layer of so many bits need not have. A right
    layer may well have the greatest effect on the outputs, and a wrong one a small effect: :meth:`by_effect` ranks by
    that, which is the order in which to spend bits.

    Attributes:
        layers: Every layer, the least probable error first.
    """

    layers: tuple[LayerErrors, ...]

    def by_effect(self) -> tuple[LayerErrors, ...]:
        """The layers, those first whose errors move the outputs most."""
        return tuple(sorted(self.layers, key=lambda found: math.inf if found.effect is None else found.effect))

    def to_json(self) -> str:
        """All figures; a signal to noise of infinity as null."""
        rows = [{name: finite(figure) for name, figure in asdict(found).items()} for found in self.layers]
        return json.dumps({"layers": rows}, indent=2)

    def table(self) -> list[tuple[str, ...]]:
        """The figures as they are shown: a row of headings, then one for each layer."""
        head = (
            "",
            "layer",
            "node",
            "operator",
            "excess dB",
            "local dB",
            "accumulated dB",
            "effect dB",
            "saturated",
            "range",
        )
        rows: list[tuple[str, ...]] = [head]
        for rank, found in enumerate(self.layers, 1):
            figures = (found.excess, found.local, found.accumulated, found.effect)
            shares = (found.saturated, found.range_use)
            rows.append(
                (
                    str(rank),
                    found.layer or "-",
                    found.node,
                    found.operator,
                    *("-" if f is None else f"{f:.1f}" for f in figures),
                    *("-" if s is None else f"{s:.1%}" for s in shares),
                )
            )
        return rows

    def __str__(self) -> str:
        worst = ", ".join(f"{c} ({sqnr:.1f} dB)" for c, sqnr in self.layers[0].worst_channels())
        return "\n".join([*aligned(self.table()), f"worst channels of {self.layers[0].node}: {worst}"])


def _sqnr(signal: float, noise: float) -> float:
    return math.inf if noise == 0 else decibel(signal / noise)
