"""The result of ``diagnose``: the layers, ordered by how much their error exceeds what their quantization must cost."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass

from quantflow.analysis.error_statistics import Sums, decibel, finite
from quantflow.text_table import aligned


@dataclass(frozen=True)
class LayerErrors:
    """The errors of one layer of a quantized network, measured at the output of an operator.

    Attributes:
        node: The name of its node in the quantized graph.
        layer: The module that it was traced from; ``""`` for the model itself.
        operator: The name of the operator; ``"input"`` for an input.
        excess: By how much the error that it adds exceeds the error that as many integers over the extremes of the same values
            and weights must have, dB. About 0 for a layer that is right.
        local: Signal to noise of its output, from float inputs through its own quantized weights and ranges, dB.
        accumulated: Signal to noise of its output within the quantized network, dB.
        effect: Signal to noise of the network's outputs if it alone were quantized, to first order, dB; None where there is no
            gradient.
        saturated: The share of its float values outside its range, 0 to 1; None without a range fixed ahead.
        range_use: The width of its float values' range over that of its range; None without a range fixed ahead.
        histogram: How many float values lie below the range, in each sixteenth of it, and above it.
        channels: Signal to noise of each channel, dB, from float inputs.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> x = torch.randn(8, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> graph = qf.export(model, (x,)).module()
        >>> prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
        >>> errors = qf.diagnose(graph, prepared, [x], progress=False).layers[0]
        >>> len(errors.channels) in (3, 8), len(errors.worst_channels(2))
        (True, 2)
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
        """Compute the errors from sums over the data.

        Args:
            names: The names of the node, the layer and the operator.
            sums: The sums over the data.
            outputs: The number of elements of the outputs for each example.
            grid: The ends of the range of the integers; None without a range fixed ahead.

        Returns:
            The errors.
        """
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
        """Return the channels with the least signal to noise.

        Args:
            count: How many.

        Returns:
            The number of each channel and its signal to noise, dB, the worst first.
        """
        order = sorted(range(len(self.channels)), key=lambda c: self.channels[c])
        return tuple((c, self.channels[c]) for c in order[:count])


@dataclass(frozen=True)
class Diagnosis:
    """Errors of a quantized network against its float network, by layer; ``print`` shows the table.

    Layers are ranked by :attr:`LayerErrors.excess`: a fault is an error that a layer of so many bits need not have. A correct
    layer can have the greatest effect on the outputs, and a faulty one a small effect: :meth:`by_effect` ranks by
    the effect, which is the order in which to spend bits.

    Attributes:
        layers: Every layer, the greatest excess first.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> x = torch.randn(8, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> graph = qf.export(model, (x,)).module()
        >>> prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), [x], progress=False)
        >>> diagnosis = qf.diagnose(graph, prepared, [x], progress=False)
        >>> len(diagnosis.by_effect()) == len(diagnosis.layers) == len(diagnosis.table()) - 1
        True
    """

    layers: tuple[LayerErrors, ...]

    def by_effect(self) -> tuple[LayerErrors, ...]:
        """Return the layers, ordered by the effect of their errors on the outputs."""
        return tuple(sorted(self.layers, key=lambda found: math.inf if found.effect is None else found.effect))

    def to_json(self) -> str:
        """Return all figures as a JSON object; a figure that is not finite is null."""
        rows = [{name: finite(figure) for name, figure in asdict(found).items()} for found in self.layers]
        return json.dumps({"layers": rows}, indent=2)

    def table(self) -> list[tuple[str, ...]]:
        """Return the figures as they are shown: a row of headings, then a row for each layer."""
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
