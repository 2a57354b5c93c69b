"""A prepared network in which some observers quantize: what a change of these leaves as it was is not computed again."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.state import is_written, writes_for_others
from quantflow.simulation.float_weights import attribute
from quantflow.simulation.interpreter import UNKNOWN, Interpreter, Values, float_tensors


class PartialNetwork:
    """One batch through a prepared graph in which the observer calls ``active`` quantize and the others let pass.

    It holds every value of the batch.

    Args:
        graph: A prepared and calibrated graph.
        flat: The flat inputs of the batch.
        active: The nodes of the observers that quantize.

    Attributes:
        returned: The float outputs.
    """

    def __init__(self, graph: GraphModule, flat: Sequence[object], active: Collection[Node]) -> None:
        self.graph, self.flat, self.active = graph, flat, frozenset(active)
        reads = [n for n in graph.graph.nodes if n.op == "get_attr" and not is_written(n)]
        self._constants = {n: attribute(graph, n) for n in reads}
        # A write into memory that several nodes see can't be done again.
        self._reusable = not any(writes_for_others(n) for n in graph.graph.nodes)
        self._values: Values = {}
        self.returned = self._run(self.active, self._values)

    def outputs(self, active: Collection[Node]) -> list[torch.Tensor]:
        """The float outputs when the observer calls ``active`` quantize instead."""
        return self._run(frozenset(active), {})

    @torch.no_grad()
    def _run(self, active: frozenset[Node], values: Values) -> list[torch.Tensor]:
        def known(node: Node, current: Values) -> Any:
            if node in self._constants:
                return self._constants[node]
            held = self._reusable and node in self._values and node.op not in ("placeholder", "get_attr")
            if not held or (node in active) != (node in self.active):
                return UNKNOWN
            same = all(current[n] is self._values[n] for n in node.all_input_nodes)
            return self._values[node] if same else UNKNOWN

        network = Interpreter(self.graph, quantize=active)
        return float_tensors(network.outputs(self.flat, values=values, known=known, keep=True))
