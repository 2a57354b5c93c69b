"""``sensitivity``: the cost of each layer in integers, alone and with all others.

The gradients that weight errors in post-training algorithms are in ``quantflow/simulation/output_gradients.py``.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from quantflow.analysis.error_statistics import finite
from quantflow.analysis.layers import layers_of, observers_in
from quantflow.data.batches import PickInputs
from quantflow.data.sample import Sample
from quantflow.metrics import decibels
from quantflow.simulation.partial import PartialNetwork
from quantflow.simulation.preconditions import check_calibrated, draw
from quantflow.text_table import aligned


@dataclass(frozen=True)
class LayerCost:
    """The effect of quantizing one layer, its weights and its outputs, on the network's outputs.

    Attributes:
        layer: The name of the module, or of the node where there is no module.
        to_integers: Signal to noise of the outputs with this layer alone quantized, dB.
        to_float: Signal to noise of the outputs with all layers but this one quantized, dB.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> x = torch.randn(8, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)).eval()
        >>> prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
        >>> found = qf.sensitivity(qf.calibrate(prepared, [x], progress=False), [x], progress=False)
        >>> found.layers[0].to_integers <= found.layers[-1].to_integers
        True
    """

    layer: str
    to_integers: float
    to_float: float


@dataclass(frozen=True)
class Sensitivities:
    """The cost of every quantized layer; ``print`` shows the table.

    Attributes:
        all_integers: Signal to noise of the outputs with every layer quantized, dB.
        layers: The layers, the one first that costs most alone.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> x = torch.randn(8, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)).eval()
        >>> prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
        >>> found = qf.sensitivity(qf.calibrate(prepared, [x], progress=False), [x], progress=False)
        >>> found.table()[0]
        ('layer', 'to integers dB', 'to float dB', 'gain dB')
    """

    all_integers: float
    layers: tuple[LayerCost, ...]

    def to_json(self) -> str:
        """Return all figures as a JSON object; a figure that is not finite is null."""
        rows = [{name: finite(figure) for name, figure in asdict(found).items()} for found in self.layers]
        return json.dumps({"all_integers": finite(self.all_integers), "layers": rows}, indent=2)

    def table(self) -> list[tuple[str, ...]]:
        """Return the figures as they are shown: a row of headings, then a row for each layer."""
        rows: list[tuple[str, ...]] = [("layer", "to integers dB", "to float dB", "gain dB")]
        for found in self.layers:
            figures = (found.to_integers, found.to_float, found.to_float - self.all_integers)
            rows.append((found.layer, *(f"{figure:.1f}" for figure in figures)))
        return rows

    def __str__(self) -> str:
        lines = aligned(self.table(), figures=True)
        return "\n".join([*lines, f"all in integers: {self.all_integers:.1f} dB"])


def sensitivity(
    prepared: GraphModule,
    data: Sample | Iterable[object],
    *,
    inputs: PickInputs | None = None,
    batches: int = 4,
    progress: bool = True,
) -> Sensitivities:
    """Measure, in simulation, the network's outputs with each layer alone quantized, and with all layers but it.

    Only what lies behind the layer is computed again. A layer's inputs are quantized by the layer that makes them.

    Args:
        prepared: A prepared and calibrated graph (PTQ), before :func:`quantflow.recover`, which writes rounded weights.
        data: The sample that :func:`quantflow.calibrate` drew, or batches to draw one from.
        inputs: Picks the inputs out of a batch, where that is ambiguous.
        batches: The most batches, of at most 8 examples each, to measure on.
        progress: Show a progress bar.

    Returns:
        The signal to noise of the outputs for each layer; ``print`` shows a table.

    Raises:
        QuantflowError: at stage ``"sensitivity"``, when the graph is not prepared for PTQ or not calibrated, a batch does not
            fit it, or there is no data.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> x = torch.randn(8, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3)).eval()
        >>> prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
        >>> found = qf.sensitivity(qf.calibrate(prepared, [x], progress=False), [x], progress=False)
        >>> sorted(cost.layer for cost in found.layers)
        ['0', '2']
    """
    check_calibrated(prepared, "sensitivity")
    drawn = draw(prepared, data, stage="sensitivity", inputs=inputs)[:batches]
    layers, every = layers_of(prepared), frozenset(observers_in(prepared))
    total = OutputNoise()
    alone, others = ({layer.name: OutputNoise() for layer in layers} for _ in range(2))
    bar = tqdm(total=len(drawn) * len(layers), desc="sensitivity", unit="layer", disable=not progress, leave=False)
    for batch in drawn:
        base = PartialNetwork(prepared, batch, ())
        full = PartialNetwork(prepared, batch, every)
        total.add(base.returned, full.returned)
        for layer in layers:
            alone[layer.name].add(base.returned, base.outputs(layer.observers))
            others[layer.name].add(base.returned, full.outputs(every - layer.observers))
            bar.update()
    bar.close()
    costs = (LayerCost(layer.name, alone[layer.name].sqnr, others[layer.name].sqnr) for layer in layers)
    return Sensitivities(total.sqnr, tuple(sorted(costs, key=lambda cost: cost.to_integers)))


class OutputNoise:
    """Signal and noise of each output, summed over batches."""

    def __init__(self) -> None:
        self.sums: dict[int, list[float]] = {}

    def add(self, exact: Collection[torch.Tensor], found: Collection[torch.Tensor]) -> None:
        """Count the outputs of one batch, without and with noise."""
        for index, (ours, theirs) in enumerate(zip(exact, found, strict=True)):
            sums = self.sums.setdefault(index, [0.0, 0.0])
            sums[0] += float(ours.double().square().sum())
            sums[1] += float((theirs - ours).double().square().sum())

    @property
    def mean(self) -> float:
        """The noise of an output in units of its own power, the mean over outputs."""
        shares = [noise / signal for signal, noise in self.sums.values() if signal > 0]
        return sum(shares) / len(shares) if shares else 0.0

    @property
    def sqnr(self) -> float:
        """The same as signal to noise, dB."""
        return decibels(1.0, self.mean)
