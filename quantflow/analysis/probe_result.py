"""The result of ``probe``: the runtime's tensors within a program beside those of its graph."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from quantflow.pictures import new_figure, save
from quantflow.text_table import aligned


@dataclass(frozen=True)
class Probed:
    """One tensor within a program, as the runtime has it.

    Attributes:
        node: The name of its node in the quantized graph.
        layer: The module that it was traced from; ``""`` for the model itself.
        operator: The name of the operator that computes it; ``"input"`` for an input.
        step: Its scale, the difference of two neighbouring quantized values; None in float.
        local: Signal to noise of what the operator computes on the runtime against what it computes in the graph from the very
            same inputs, those of the runtime, dB; infinite where all is equal.
        most_steps: By how many steps an element differs there, at most; None in float.
        changed: The share of elements that differ there, 0 to 1.
        accumulated: Signal to noise of the runtime's tensor against the graph's own, dB.
        against_float: Signal to noise of the runtime's tensor against the float network's, dB; None without a float network, or
            where that has no such tensor.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> x = torch.randn(1, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
        >>> found = qf.probe(qf.calibrate(prepared, [x], progress=False), [x], progress=False)
        >>> found.tensors[0].operator, found.tensors[0].changed
        ('input', 0.0)
    """

    node: str
    layer: str
    operator: str
    step: float | None
    local: float
    most_steps: float | None
    changed: float
    accumulated: float
    against_float: float | None


@dataclass(frozen=True)
class ProbeResult:
    """Differences between a program on the runtime and its graph; ``print`` shows the table, the largest first.

    Attributes:
        tensors: The tensors, in the order of the graph.
        delegate_calls: The number of calls of the delegate in which they were computed.
        calls: The number of calls of the program that were compared.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> x = torch.randn(1, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> prepared = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
        >>> found = qf.probe(qf.calibrate(prepared, [x], progress=False), [x], progress=False)
        >>> found.calls, found.delegate_calls, len(found.ranked())
        (1, 1, 2)
    """

    tensors: tuple[Probed, ...]
    delegate_calls: int
    calls: int

    def ranked(self) -> tuple[Probed, ...]:
        """Return the tensors, ordered by how much their operators differ from the graph."""
        return tuple(sorted(self.tensors, key=lambda t: -math.inf if math.isnan(t.local) else t.local))

    def to_json(self) -> str:
        """Return all figures as a JSON object; an infinite signal to noise is null, NaN and minus infinity are text."""
        rows = [{name: _written(figure) for name, figure in asdict(t).items()} for t in self.tensors]
        return json.dumps({"delegate_calls": self.delegate_calls, "calls": self.calls, "tensors": rows}, indent=2)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the signal to noise of each tensor, in the order of the graph.

        Args:
            path: The image file; its extension says which format.

        Returns:
            The path of the file.

        Raises:
            QuantflowError: at stage ``"probe"``, without matplotlib, or where the file can't be written.
        """
        figure = new_figure("probe", 8, 4)
        axes = figure.subplots()
        figures = {
            "its operator alone": [t.local for t in self.tensors],
            "with all before it": [t.accumulated for t in self.tensors],
            "against float": [math.nan if t.against_float is None else t.against_float for t in self.tensors],
        }
        for label, values in figures.items():
            if any(map(math.isfinite, values)):
                axes.plot([v if math.isfinite(v) else math.nan for v in values], marker=".", label=label)
        axes.set_xlabel("tensor, in the order of the graph (none where all elements are equal)")
        axes.set_ylabel("signal to noise on the runtime, dB")
        if axes.lines:
            axes.legend()
        return save(figure, path, "probe")

    def __str__(self) -> str:
        head = ("node", "layer", "operator", "local dB", "steps", "changed", "accumulated dB", "against float dB")
        rows = [head, *(_row(t) for t in self.ranked())]
        exact = sum(t.changed == 0 for t in self.tensors)
        calls = f"{self.delegate_calls} delegate call{'s' * (self.delegate_calls != 1)}"
        last = f"{exact} of {len(self.tensors)} tensors are the graph's to the bit; {self.calls} calls, {calls}"
        return "\n".join([*aligned(rows), last])


def _written(figure: object) -> object:
    if not isinstance(figure, float) or math.isfinite(figure):
        return figure
    return None if figure == math.inf else str(figure)


def _row(t: Probed) -> tuple[str, ...]:
    steps = "-" if t.most_steps is None else f"{t.most_steps:.0f}"
    behind = "-" if t.against_float is None else f"{t.against_float:.1f}"
    return (
        t.node,
        t.layer or "-",
        t.operator,
        f"{t.local:.1f}",
        steps,
        f"{t.changed:.2%}",
        f"{t.accumulated:.1f}",
        behind,
    )
