"""A prepared network, part of it in integers: what a change leaves as it was is not computed again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from quantflow.graph.state import is_written, writes_for_others
from quantflow.observers.observation import observer_of
from quantflow.simulation.float_weights import attribute, given_input
from quantflow.simulation.interpreter import Values, evaluate, float_outputs, quantized


class PartialNetwork:
    """One batch through a prepared ``graph``, with the observer calls ``active`` quantizing and the others letting pass.

    It holds every value of the batch.
    """

    def __init__(self, graph: GraphModule, flat: Sequence[Any], active: Collection[Node]) -> None:
        self.graph, self.flat, self.active = graph, flat, frozenset(active)
        reads = [n for n in graph.graph.nodes if n.op == "get_attr" and not is_written(n)]
        self.fixed = {n: attribute(graph, n) for n in reads}
        # A write into memory that several nodes see can't be done again.
        self.once = any(writes_for_others(n) for n in graph.graph.nodes)
        self.values: Values = {}
        self.returned = self._run(self.active, self.values)

    def outputs(self, active: Collection[Node]) -> list[torch.Tensor]:
        """The float outputs with other observer calls quantizing."""
        return self._run(frozenset(active), {})

    @torch.no_grad()
    def _run(self, active: frozenset[Node], values: Values) -> list[torch.Tensor]:
        given = iter(self.flat)
        for node in self.graph.graph.nodes:
            if node.op == "output":
                return float_outputs(node, values)
            if node.op == "placeholder":
                values[node] = given_input(node, next(given))
            elif node.op == "get_attr":
                values[node] = self.fixed[node] if node in self.fixed else attribute(self.graph, node)
            elif self._same(node, active, values):
                values[node] = self.values[node]
            else:
                values[node] = self._value(node, active, values)
        return []

    def _same(self, node: Node, active: frozenset[Node], values: Values) -> bool:
        if self.once or node not in self.values or (node in active) != (node in self.active):
            return False
        return all(values[n] is self.values.get(n, self.fixed.get(n)) for n in node.all_input_nodes)

    def _value(self, node: Node, active: frozenset[Node], values: Values) -> Any:
        if node.op == "call_function":
            return evaluate(node, values)
        args = map_arg(node.args, lambda n: values[n])
        observer = observer_of(node, self.graph)
        if observer is None:
            return self.graph.get_submodule(str(node.target))(*args)
        return quantized(observer, args[0], node.users) if node in active else args[0]
