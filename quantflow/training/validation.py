"""What ``validate`` of ``train`` measures: ``Fidelity`` to the float network, without labels, or ``Accuracy``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quantflow.data.batches import PickInputs, batches
from quantflow.errors import QuantflowError
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.graph.own_state import state_kept
from quantflow.graph.parameters import device_of
from quantflow.metrics import decibels, right, squares
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
        networks = (self.network, graph)
        with contextlib.ExitStack() as kept:
            states = [kept.enter_context(state_kept(each)) for each in networks if isinstance(each, nn.Module)]
            for batch in batches(self.data, graph, stage="train", inputs=self.inputs, device=device_of(graph)):
                for state in states if batch.begins else ():
                    state.put_back()
                outputs = (pytree.tree_leaves(network(*batch.args, **batch.kwargs)) for network in networks)
                wanted, found = map(float_tensors, outputs)
                sums.append([figure for pair in zip(wanted, found, strict=True) for figure in squares(*pair)])
        if not sums:
            raise _no_data()
        total = [sum(column) for column in zip(*sums, strict=True)]
        ratios = [decibels(signal, noise) for signal, noise in zip(total[::2], total[1::2], strict=True)]
        return sum(ratios) / len(ratios)


@dataclass(frozen=True)
class Accuracy:
    """The share of examples whose predicted class is their label, 0 to 1.

    Attributes:
        data: Batches of ``(inputs, label)`` that training does not see.
        inputs: Picks the inputs out of a batch, where that is ambiguous.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> graph = qf.export(torch.nn.Identity(), (torch.randn(2, 8),), dynamic_batch=True).module()
        >>> qf.Accuracy([(torch.eye(8), torch.arange(8))])(graph)
        1.0
    """

    data: Iterable[object]
    inputs: PickInputs | None = None

    @torch.no_grad()
    def __call__(self, graph: TrainableGraphModule) -> float:
        """Measure ``graph``.

        Args:
            graph: A classifier in inference mode, which returns scores [batch, classes].

        Returns:
            The share of right examples.

        Raises:
            QuantflowError: at stage ``"train"``, if there are no data or labels, or the output is no classifier's.
        """
        found: list[torch.Tensor] = []
        with state_kept(graph):
            for batch in batches(self.data, graph, stage="train", inputs=self.inputs, device=device_of(graph)):
                output = graph(*batch.args, **batch.kwargs)
                labels = batch.target if isinstance(batch.target, torch.Tensor) else None
                share = None if labels is None or not isinstance(output, torch.Tensor) else right(output, labels)
                if share is None:
                    reason = "these are no scores of classes with labels"
                    remedy = "batches of (inputs, label), or qf.Fidelity"
                    raise QuantflowError("train", reason, node="validate", remedy=remedy)
                found.append(share.double())
        if not found:
            raise _no_data()
        return float(torch.cat(found).mean())


def _no_data() -> QuantflowError:
    remedy = "a list or a DataLoader with at least one batch"
    return QuantflowError("train", "there are no data to validate on", node="validate", remedy=remedy)
