"""Preconditions of training: a graph that can learn, and the same run in every process."""

from __future__ import annotations

import warnings

from quantflow.capture.exported import INFERENCE_ONLY
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.observers.observation import is_converted


def check_can_learn(graph: TrainableGraphModule) -> None:
    """Raise for a graph that can't learn; warn of layers whose training behavior is not in the graph."""
    if not any(p.requires_grad for p in graph.parameters()) or is_converted(graph):
        remedy = "train before qf.convert: qf.prepare(graph, quantizer, qat=True), qf.train, qf.convert"
        raise QuantflowError("train", "the graph is converted, or has nothing to train", node="graph", remedy=remedy)
    if lost := graph.meta.get(INFERENCE_ONLY):
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        reason = "these may train differently than in eager mode: their behavior in training is not in the graph"
        remedy = "for a few epochs of QAT often none is needed; otherwise train these layers in eager mode first"
        warnings.warn(QuantflowWarning("train", reason, node=names, remedy=remedy), stacklevel=3)


def check_alike(everyone: list[list[object]]) -> None:
    """Raise if graphs, options or resumed steps differ between processes."""
    (kind, step), *others = everyone
    for rank, (theirs, their_step) in enumerate(others, 1):
        if theirs != kind:
            reason, remedy = (
                "it has another graph, optimizer or options than rank 0",
                "the same script for all processes",
            )
            raise QuantflowError("train", reason, node=f"rank {rank}", remedy=remedy)
        if their_step != step:
            reason = f"it resumes at step {their_step}, rank 0 at {step}"
            remedy = "a folder of checkpoints that all processes see"
            raise QuantflowError("train", reason, node=f"rank {rank}", remedy=remedy)
