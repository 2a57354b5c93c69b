"""The paired interpreter: the float network and the integer network side by side, layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node
from tqdm import tqdm

from quantflow.data.sample import Inputs
from quantflow.graph.aten import node_argument
from quantflow.graph.state import is_written
from quantflow.simulation.fake_quantized import fake_quantized
from quantflow.simulation.float_weights import FLOAT_WEIGHT, attribute
from quantflow.simulation.interpreter import UNKNOWN, Interpreter, Values
from quantflow.simulation.network import live_bytes
from quantflow.simulation.quantized_layers import Layer
from quantflow.upstream import pytree

MEMORY = 2 * 2**30  # bytes, for what of both networks lives at once

_Lookup = Callable[[Node, Values], Any]


@dataclass(frozen=True)
class LayerPair:
    """A layer in both networks.

    Attributes:
        layer: The layer.
        floats: For each batch that has begun, the values of the float network that are alive, the layer's output among them.
        integers: For each, those of the integer network, the layer's quantized inputs and weight among them.
    """

    layer: Layer
    floats: list[Values]
    integers: list[Values]


@torch.no_grad()
def run_paired(
    graph: GraphModule,
    sample: Sequence[Inputs],
    layers: dict[Node, Layer],
    *,
    title: str,
    progress: bool,
    memory: int = MEMORY,
) -> Iterator[LayerPair]:
    """Run ``graph`` as the float network and as the integer network, and stop at each of ``layers``.

    At a stop the caller may change the weight, its observer and the bias in ``graph``: the integer network goes on with these,
    the float network with the output that it has. The batches of which all values fit ``memory`` begin at once, two at least;
    the others begin where the values become smaller, so that later layers see more batches.

    Args:
        graph: A prepared and calibrated graph; the caller recompiles what it changed.
        sample: Batches of flat inputs.
        layers: What :func:`quantflow.simulation.quantized_layers.quantized_layers` found.
        title: Of the progress bar.
        progress: Show it.
        memory: Bytes for the values of both networks.
    """
    networks = _Networks(graph, layers)
    fitting = _batches_that_fit(graph, sample, memory)
    pending = iter(sample)
    with tqdm(total=len(layers), desc=title, unit="layer", disable=not progress, leave=False) as bar:
        for node in graph.graph.nodes:
            networks.advance()
            if node in layers or not networks.floats:
                for batch in itertools.islice(pending, max(fitting[node] - len(networks.floats), 0)):
                    networks.begin(batch, node)
            if node in layers:
                yield LayerPair(layers[node], networks.floats, networks.integers)
                networks.read_again(layers[node])
                bar.update()


def _batches_that_fit(graph: GraphModule, sample: Sequence[Inputs], memory: int) -> dict[Node, int]:
    """By node, how many batches both networks may hold from there to the end, two or more."""
    alive = live_bytes(graph, sample[0])
    largest = itertools.accumulate(reversed(alive.values()), max)
    return {n: max(2, memory // (2 * most)) for n, most in zip(reversed(alive), largest, strict=True)}


class _Networks:
    """The float network and the integer network, each run on every batch that has begun, in step."""

    def __init__(self, graph: GraphModule, layers: dict[Node, Layer]) -> None:
        self.floats: list[Values] = []
        self.integers: list[Values] = []
        self._graph, self._layers = graph, layers
        self._float, self._integer = Interpreter(graph, float_weights=True), Interpreter(graph, quantize=True)
        self._runs: list[Iterator[tuple[Node, Values]]] = []
        self._weights = {layer.weight for layer in layers.values()}
        self._written = {node for node in graph.graph.nodes if is_written(node)}
        self._passed: set[Node] = set()  # the layers whose weights are as they stay

    def advance(self) -> None:
        """Compute the next node of every run."""
        for run in self._runs:
            next(run)

    def begin(self, batch: Inputs, node: Node) -> None:
        """Run both networks on ``batch`` up to ``node``."""
        reference: Values = {}
        values: Values = {}
        first_floats, first_integers = (held[0] if held else {} for held in (self.floats, self.integers))
        runs = [
            self._float.run(batch, values=reference, known=self._computed(first_floats)),
            self._integer.run(batch, values=values, known=self._shared(self._computed(first_integers), reference)),
        ]
        for reached in zip(*runs, strict=False):
            if reached[0][0] is node:
                break
        self._runs += runs
        self.floats.append(reference)
        self.integers.append(values)

    def read_again(self, layer: Layer) -> None:
        """Compute the layer's output in the integer network from the weight and bias that the graph has now."""
        self._passed.add(layer.node)
        observer = self._graph.get_submodule(str(layer.weight.target))
        weight = fake_quantized(observer, attribute(self._graph, node_argument(layer.weight)))
        for values in self.integers:
            values[layer.weight] = weight
            if layer.bias is not None:
                values[layer.bias] = attribute(self._graph, layer.bias)
            values[layer.node] = self._integer.value(layer.node, values)

    def _computed(self, first: Values) -> _Lookup:
        """The quantized weights are those of the first batch, which is computed before the others."""
        return lambda node, _: first.get(node, UNKNOWN) if node in self._weights else UNKNOWN

    def _shared(self, computed: _Lookup, reference: Values) -> _Lookup:
        """The integer network has the float network's values until something is quantized. A layer is computed after its
        stop.
        """

        def known(node: Node, values: Values) -> Any:
            if node in self._layers and node not in self._passed:
                return None
            if node.op == "get_attr":
                return UNKNOWN if node in self._written or FLOAT_WEIGHT in node.meta else reference[node]
            if node.op == "call_function" and all(reference[n] is values[n] for n in node.all_input_nodes):
                same = reference[node]  # both networks would write into it
                return pytree.tree_map_only(torch.Tensor, torch.clone, same) if node in self._written else same
            return computed(node, values)

        return known
