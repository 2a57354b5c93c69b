"""The verb that shows a prepared graph data, so that its observers learn their ranges (PTQ)."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sized
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule
from tqdm import tqdm

from quantflow.batches import PickInputs, batches
from quantflow.errors import QuantflowError
from quantflow.fake_quantize import FakeQuantize
from quantflow.observation import observers_of
from quantflow.recovery.sample import Sample
from quantflow.signature import Signature

G = TypeVar("G", bound=GraphModule)


def calibrate(
    graph: G,
    data: Iterable[Any],
    *,
    inputs: PickInputs | None = None,
    max_batches: int | None = None,
    device: torch.device | str | None = None,
    sample: Sample | None = None,
    progress: bool = True,
) -> G:
    """Run ``data`` through the prepared ``graph`` in inference mode, without gradients, observing.

    Args:
        graph: A prepared graph. Its observers are updated in place; its mode is left as it was.
        data: An iterable of batches: tensors, tuples or dicts of inputs, or ``(inputs, target)`` as a DataLoader gives.
        inputs: Picks the inputs out of a batch, where that is ambiguous.
        max_batches: Stop after so many.
        device: Where to run; by default where the graph's parameters are.
        sample: Also draw examples from the data as they pass, for :func:`quantflow.recover`.
        progress: Show a progress bar.

    Returns:
        ``graph``.

    Raises:
        QuantflowError: at stage ``"calibrate"``, when the graph is not prepared, there is no data, or a batch does not fit
            what the graph takes; a batch that comes before the faulty one has been observed.
    """
    if not isinstance(graph, GraphModule) or not observers_of(graph):
        remedy = "call qf.prepare(graph, quantizer) first"
        raise QuantflowError("calibrate", "the graph was not prepared", node="graph", remedy=remedy)
    device = device or next((t.device for t in itertools.chain(graph.parameters(), graph.buffers())), None)
    graph.to(device)
    total = len(data) if isinstance(data, Sized) else None
    total = total if max_batches is None else min(max_batches, total or max_batches)
    feed = itertools.islice(batches(data, graph, stage="calibrate", inputs=inputs, device=device), max_batches)
    signature = Signature.of_graph(graph)
    seen = 0
    with _calibrating(graph), torch.no_grad():
        for batch in tqdm(feed, desc="calibrate", total=total, unit="batch", disable=not progress, leave=False):
            graph(*batch.args, **batch.kwargs)
            if sample is not None:
                sample.add(signature.flatten(batch.args, batch.kwargs, stage="calibrate"), signature)
            seen += 1
    if not seen:
        raise QuantflowError("calibrate", "the calibration set is empty", node="data", remedy="pass at least one batch")
    return graph


@contextlib.contextmanager
def _calibrating(graph: GraphModule) -> Iterator[None]:
    training = graph.training
    fake_quantizers = [m for m in graph.modules() if isinstance(m, FakeQuantize)]
    _set_mode(graph, False)
    for module in fake_quantizers:
        module.calibrate(True)
    try:
        yield
    finally:
        for module in fake_quantizers:
            module.calibrate(False)
        _set_mode(graph, training)


def _set_mode(graph: GraphModule, training: bool) -> None:
    # A graph that stock torchao prepared refuses train() and eval(); it holds its mode on its nodes.
    with contextlib.suppress(NotImplementedError):
        graph.train(training)
