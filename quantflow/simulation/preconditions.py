"""Preconditions of post-training algorithms: a float or a calibrated graph, and a sample of the data."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import GraphModule

from quantflow.data.batches import PickInputs, batches
from quantflow.data.sample import Inputs, Sample
from quantflow.errors import QuantflowError
from quantflow.graph.parameters import device_of
from quantflow.observers.observation import has_seen_data, is_fake_quantizer, observers_of
from quantflow.signature.signature import Signature
from quantflow.simulation.stateful_calls import stateful_calls


def check_float(graph: object, stage: str) -> None:
    """Refuse what is not a captured graph before it is prepared."""
    if not isinstance(graph, GraphModule):
        reason, remedy = f"{type(graph).__name__} is no captured graph", "pass qf.export(model, args).module()"
        raise QuantflowError(stage, reason, node="graph", remedy=remedy)
    if observers := observers_of(graph):
        remedy = "this pass works on the float graph: call it before qf.prepare"
        raise QuantflowError(stage, "the graph is prepared already", node=next(iter(observers)), remedy=remedy)


def check_calibrated(graph: object, stage: str, *, trainable: bool = False) -> None:
    """Refuse what is not a graph that is prepared for PTQ (or, if ``trainable``, for QAT) and calibrated."""
    observers = observers_of(graph) if isinstance(graph, GraphModule) else {}
    if not observers:
        remedy = "call qf.prepare(graph, quantizer) and qf.calibrate first"
        raise QuantflowError(stage, "the graph was not prepared", node="graph", remedy=remedy)
    for name, observer in observers.items():
        if is_fake_quantizer(observer) and not trainable:
            remedy = "use qf.recover, which takes such a graph, or prepare the graph without qat=True"
            raise QuantflowError(stage, "the graph is prepared for training", node=name, remedy=remedy)
        if not has_seen_data(observer):
            remedy = "call qf.calibrate(graph, data) first"
            raise QuantflowError(stage, "the graph was not calibrated", node=name, remedy=remedy)


def draw(
    graph: GraphModule, data: Sample | Iterable[object], *, stage: str, inputs: PickInputs | None = None
) -> tuple[Inputs, ...]:
    """Batches of flat inputs of ``graph``: those of a :class:`Sample`, or of one drawn from the batches of ``data``.

    Raises:
        QuantflowError: at ``stage``, when a batch does not fit the graph or there is none.
    """
    sample = data if isinstance(data, Sample) else Sample()
    if not isinstance(data, Sample):
        signature = Signature.of_graph(graph)
        feed = batches(data, graph, stage=stage, inputs=inputs, device=device_of(graph))
        for flat in stateful_calls(graph, feed, signature, stage=stage):
            sample.add(flat, signature)
    if not len(sample):
        remedy = "pass at least one batch; a Sample is filled by qf.calibrate(graph, data, sample=sample)"
        raise QuantflowError(stage, "there is no data", node="data", remedy=remedy)
    return sample.batches()
