"""Recording of the outputs of layers while a captured graph runs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.fx import Node

from quantflow.errors import QuantflowError
from quantflow.graph.aten import is_float_tensor
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.graph.parameters import unused_name
from quantflow.graph.state import is_written


class FeatureRecorder(nn.Module):
    """An identity module that keeps its last input, with its gradient, until :meth:`take`."""

    def __init__(self, *, overwritten: bool) -> None:
        super().__init__()
        self.overwritten = overwritten
        self.value: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.value = x.clone() if self.overwritten else x  # a later operator writes into it
        return x

    def take(self) -> torch.Tensor:
        """Return the last input and release it."""
        value, self.value = self.value, None
        assert value is not None, "the graph has not run"
        return value


@contextlib.contextmanager
def recorded_features(graph: object, layers: Sequence[str]) -> Iterator[list[FeatureRecorder]]:
    """Insert recorders on the outputs of ``layers`` (dotted names of the eager model); remove them at the end.

    Raises:
        QuantflowError: at stage ``"train"``, when ``graph`` is no captured graph or has no such layer.
    """
    if not layers:
        yield []
        return
    if not isinstance(graph, TrainableGraphModule):
        reason, remedy = f"{type(graph).__name__} has no nodes to recorder", "use qf.export(model, args).module()"
        raise QuantflowError("train", reason, node="features", remedy=remedy)
    outputs = [_output_of(graph, layer) for layer in layers]
    recorders, calls = [], []
    room = unused_name(graph, "recorders")
    for index, node in enumerate(outputs):
        recorder = FeatureRecorder(overwritten=is_written(node))
        graph.add_submodule(f"{room}.{index}", recorder)
        with graph.graph.inserting_after(node):
            calls.append(graph.graph.call_module(f"{room}.{index}", (node,)))
        recorders.append(recorder)
    graph.recompile()
    try:
        yield recorders
    finally:
        for call in calls:
            graph.graph.erase_node(call)
        graph.delete_submodule(room)
        graph.recompile()


def _output_of(graph: TrainableGraphModule, layer: str) -> Node:
    """The last tensor computed in ``layer``."""
    found: Node | None = None
    names: set[str] = set()
    for node in graph.graph.nodes:
        stack = node.meta.get("nn_module_stack") or {}
        inside = {re.sub(r"@\d+$", "", name) for name, _ in stack.values()}
        names |= inside
        if layer in inside and is_float_tensor(node):
            found = node
    if found is None:
        near = sorted(n for n in names if n.startswith(layer.split(".")[0]))[:4]
        remedy = f"the dotted name of a layer, as {', '.join(near or sorted(names)[:4])}"
        raise QuantflowError("train", f"no layer {layer!r} in the graph", node="features", remedy=remedy)
    return found
