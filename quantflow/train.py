"""The verb that trains a graph prepared for QAT (or any captured graph)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm

from quantflow.batches import PickInputs, batches
from quantflow.errors import QuantflowError
from quantflow.fake_quantize import FakeQuantize
from quantflow.graph_module import TrainableGraphModule

Loss = Callable[[Any, Any], torch.Tensor]


@dataclass
class History:
    """What training measured, one entry an epoch.

    Attributes:
        loss: Mean training loss.
        metric: What ``validate`` returned; empty without it.
    """

    loss: list[float] = field(default_factory=list)
    metric: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Schedule:
    """When, as fractions of the training, what is learned from data stops moving (Jacob et al. 2018, section 3.1).

    Attributes:
        freeze_batch_norm: From here on batch norm uses its running statistics, as the integer program will.
        freeze_observers: From here on ranges stay.
    """

    freeze_batch_norm: float = 0.5
    freeze_observers: float = 0.75

    @classmethod
    def never(cls) -> Schedule:
        """Nothing freezes."""
        return cls(1.0, 1.0)


def train(
    graph: TrainableGraphModule,
    data: Iterable[Any],
    *,
    epochs: int = 1,
    loss: Loss = F.cross_entropy,
    optimizer: torch.optim.Optimizer | None = None,
    lr: float = 1e-3,
    scheduler: Any = None,
    schedule: Schedule | None = None,
    validate: Callable[[TrainableGraphModule], float] | None = None,
    inputs: PickInputs | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> History:
    """Train ``graph`` on ``(inputs, target)`` batches with ``loss(output, target).backward()`` on the graph itself.

    Args:
        graph: A captured graph, prepared with ``qat=True`` to learn its integers. Trained in place; left in inference mode.
        data: A loader, iterated once an epoch.
        epochs: How many.
        loss: Of output and target; scalar.
        optimizer: By default SGD with momentum 0.9 at ``lr``, decaying along a cosine to zero.
        lr: Learning rate of the default optimizer.
        scheduler: A learning rate scheduler, stepped after each batch.
        schedule: When batch norm and observers freeze; by default ``Schedule()`` for a graph prepared for QAT, never for one in
            float.
        validate: Called with the graph in inference mode after each epoch; its figure goes into the history.
        inputs: Picks the inputs out of a batch, where that is ambiguous.
        device: Where to train; by default where the graph's parameters are.
        progress: Show a progress bar.

    Raises:
        QuantflowError: at stage ``"train"``, when there is no data or target, or the loss stops being a number.
    """
    if not isinstance(graph, TrainableGraphModule):
        remedy = "train Exported.module(), or what qf.prepare(..., qat=True) returned"
        raise QuantflowError("train", f"{type(graph).__name__} is no captured graph", node="graph", remedy=remedy)
    device = device or next((p.device for p in graph.parameters()), None)
    graph.to(device)
    steps = len(data) * epochs if isinstance(data, Sized) else None
    if optimizer is None:
        optimizer = torch.optim.SGD(graph.parameters(), lr=lr, momentum=0.9)
        if scheduler is None and steps:
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if schedule is None:
        schedule = Schedule() if any(isinstance(m, FakeQuantize) for m in graph.modules()) else Schedule.never()
    history = History()
    try:
        with tqdm(desc="train", total=steps, unit="step", disable=not progress, leave=False) as bar:
            for epoch in range(epochs):
                _apply(schedule, graph, epoch / epochs)
                graph.train()
                history.loss.append(_epoch(graph, data, optimizer, scheduler, loss, inputs, device, bar))
                graph.eval()
                if validate is not None:
                    with torch.no_grad():
                        history.metric.append(float(validate(graph)))
                    bar.set_postfix(metric=f"{history.metric[-1]:.4f}")
    finally:
        _apply(Schedule.never(), graph, 0.0)
        graph.eval()
    return history


def _epoch(
    graph: TrainableGraphModule,
    data: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    loss: Loss,
    inputs: PickInputs | None,
    device: Any,
    bar: tqdm,
) -> float:
    total, count = torch.zeros((), device=device), 0
    for batch in batches(data, graph, stage="train", inputs=inputs, device=device):
        if batch.target is None:
            remedy = "give (inputs, target) batches"
            raise QuantflowError("train", "the batch has no target", node=f"batch {count}", remedy=remedy)
        value = loss(graph(*batch.args, **batch.kwargs), batch.target)
        if not torch.isfinite(value):
            remedy = "lower the learning rate, or clip gradients in a loop of your own"
            raise QuantflowError("train", f"the loss is {value.item()}", node=f"batch {count}", remedy=remedy)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        total, count = total + value.detach(), count + 1
        bar.update()
    if not count:
        raise QuantflowError("train", "the training set is empty", node="data", remedy="pass at least one batch")
    return float(total) / count


def _apply(schedule: Schedule, graph: TrainableGraphModule, progress: float) -> None:
    graph.freeze_batch_norm(progress >= schedule.freeze_batch_norm)
    for module in graph.modules():
        if isinstance(module, FakeQuantize):
            module.enable_observer(progress < schedule.freeze_observers)
