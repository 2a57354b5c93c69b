"""The paired interpreter: the float network and the integer network side by side, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from quantflow.simulation.interpreter import UNKNOWN, Interpreter, Known, Values
from quantflow.simulation.quantized_layers import Layer
from quantflow.upstream import pytree


@dataclass(frozen=True)
class LayerPair:
    """A layer in both networks.

    Attributes:
        layer: The layer.
        floats: For each batch, the values of the float network that are alive, the layer's output among them.
        integers: For each batch, those of the integer network, the layer's quantized inputs and weight among them.
    """

    layer: Layer
    floats: list[Values]
    integers: list[Values]


@torch.no_grad()
def run_paired(
    graph: GraphModule, sample: Sequence[Inputs], layers: dict[Node, Layer], *, title: str, progress: bool
) -> Iterator[LayerPair]:
    """Run ``graph`` as the float network and as the integer network, and stop at each of ``layers``.

    At a stop the caller may change the weight, its observer and the bias in ``graph``: the integer network goes on with these,
    the float network with the output that it has.

    Args:
        graph: A prepared and calibrated graph; the caller recompiles what it changed.
        sample: Batches of flat inputs; all are held at once, in both networks.
        layers: What :func:`quantflow.simulation.quantized_layers.quantized_layers` found.
        title: Of the progress bar.
        progress: Show it.
    """
    float_network, integer_network = Interpreter(graph, float_weights=True), Interpreter(graph, quantize=True)
    floats: list[Values] = [{} for _ in sample]
    integers: list[Values] = [{} for _ in sample]
    weights = {layer.weight for layer in layers.values()}
    written = {node for node in graph.graph.nodes if is_written(node)}
    runs: list[Iterator[tuple[Node, Values]]] = []
    for batch, reference, values in zip(sample, floats, integers, strict=True):
        first_floats = floats[0] if reference is not floats[0] else {}
        first_integers = integers[0] if values is not integers[0] else {}
        runs += [
            float_network.run(batch, values=reference, known=_computed(weights, first_floats)),
            integer_network.run(
                batch, values=values, known=_shared(_computed(weights, first_integers), reference, layers, written)
            ),
        ]
    with tqdm(total=len(layers), desc=title, unit="layer", disable=not progress, leave=False) as bar:
        for node in (step[0][0] for step in zip(*runs, strict=True)):
            if node in layers:
                yield LayerPair(layers[node], floats, integers)
                _read_again(integer_network, layers[node], integers)
                bar.update()


def _computed(weights: set[Node], first: Values) -> Known:
    """The quantized weights are those of the first batch, which is computed before the others."""
    return lambda node, _: first.get(node, UNKNOWN) if node in weights else UNKNOWN


def _shared(computed: Any, reference: Values, layers: dict[Node, Layer], written: set[Node]) -> Known:
    """The integer network has the float network's values until something is quantized. A layer is computed after its stop."""

    def known(node: Node, values: Values) -> Any:
        if node in layers:
            return None
        if node.op == "get_attr":
            return UNKNOWN if node in written or FLOAT_WEIGHT in node.meta else reference[node]
        if node.op == "call_function" and all(reference[n] is values[n] for n in node.all_input_nodes):
            same = reference[node]  # both networks would write into it
            return pytree.tree_map_only(torch.Tensor, torch.clone, same) if node in written else same
        return computed(node, values)

    return known


def _read_again(network: Interpreter, layer: Layer, integers: list[Values]) -> None:
    """Compute the layer's output in the integer network from the weight and bias that the graph has now."""
    graph = network.graph
    observer = graph.get_submodule(str(layer.weight.target))
    weight = fake_quantized(observer, attribute(graph, node_argument(layer.weight)))
    for values in integers:
        values[layer.weight] = weight
        if layer.bias is not None:
            values[layer.bias] = attribute(graph, layer.bias)
        values[layer.node] = network.value(layer.node, values)
