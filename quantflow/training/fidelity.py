"""``Fidelity``: how close a graph's outputs are to the float network's, as the ``validate`` of ``train``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from quantflow.data.batches import PickInputs, batches
from quantflow.errors import QuantflowError
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.graph.parameters import device_of
from quantflow.metrics import decibels, squares
from quantflow.simulation.interpreter import float_tensors
from quantflow.upstream import pytree


@dataclass(frozen=True)
class Fidelity:
    """The signal to noise of a graph's outputs beside those of the float network, dB, on data that needs no labels.

    Attributes:
        network: The float network, in inference mode, called with the same inputs.
        data: Batches that training does not see.
        inputs: Picks the inputs out of a batch, where that is ambiguous.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> network = qf.export(torch.nn.Linear(8, 4), (torch.randn(2, 8),)).module().eval()
        >>> data = [torch.randn(2, 8) for _ in range(2)]
        >>> graph = qf.calibrate(qf.prepare(network, XNNPACKQuantizer()), data, progress=False)
        >>> qf.Fidelity(network, data)(qf.convert(graph)) > 20.0
        True
    """

    network: Callable[..., Any]
    data: Iterable[object]
    inputs: PickInputs | None = None

    @torch.no_grad()
    def __call__(self, graph: TrainableGraphModule) -> float:
        """Measure ``graph``.

        Args:
            graph: A graph in inference mode with the inputs and outputs of the float network.

        Returns:
            The mean over outputs, dB; more is better.

        Raises:
            QuantflowError: at stage ``"train"``, if there are no data.
        """
        sums: list[list[float]] = []
        for batch in batches(self.data, graph, stage="train", inputs=self.inputs, device=device_of(graph)):
            wanted, found = (
                float_tensors(pytree.tree_leaves(network(*batch.args, **batch.kwargs)))
                for network in (self.network, graph)
            )
            sums.append([figure for pair in zip(wanted, found, strict=True) for figure in squares(*pair)])
        if not sums:
            remedy = "a list or a DataLoader with at least one batch"
            raise QuantflowError("train", "there are no data to validate on", node="validate", remedy=remedy)
        total = [sum(column) for column in zip(*sums, strict=True)]
        ratios = [decibels(signal, noise) for signal, noise in zip(total[::2], total[1::2], strict=True)]
        return sum(ratios) / len(ratios)
