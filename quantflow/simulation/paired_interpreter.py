"""The float network and the integer network side by side, stopping at every layer: what corrections are fitted on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule, Node
from tqdm import tqdm

from quantflow.data.sample import Inputs
from quantflow.graph.state import is_written
from quantflow.observers.observation import observer_of
from quantflow.simulation.float_weights import attribute, float_weight, given_input
from quantflow.simulation.interpreter import Values, evaluate, last_reads, quantized
from quantflow.simulation.quantized_layers import Layer


@dataclass(frozen=True)
class LayerPair:
    """The walk at a layer.

    Attributes:
        layer: The layer.
        floats: For each batch, the values of the float network, the layer's output among them.
        integers: For each batch, those of the integer network, the layer's quantized inputs and weight among them.
    """

    layer: Layer
    floats: list[Values]
    integers: list[Values]


@torch.no_grad()
def run_paired(
    graph: GraphModule, sample: Sequence[Inputs], layers: dict[Node, Layer], *, title: str, progress: bool
) -> Iterator[LayerPair]:
    """Walk ``graph`` as both networks, stopping at each of ``layers``.

    At a pair the weight, its observer and the bias may be changed in ``graph``: the integer network goes on with what is there
    then, the float network with the output that it has.

    Args:
        graph: A prepared and calibrated graph; the caller recompiles what it changed.
        sample: Batches of flat inputs; all are held at once, in both networks.
        layers: What :func:`quantflow.simulation.quantized_layers.quantized_layers` found.
        title: Of the progress bar.
        progress: Show it.
    """
    weights = {layer.weight for layer in layers.values()}
    dead = last_reads(graph.graph)
    written = {node for node in graph.graph.nodes if is_written(node)}
    floats: list[Values] = [{} for _ in sample]
    integers: list[Values] = [{} for _ in sample]
    given = [iter(batch) for batch in sample]
    bar = tqdm(total=len(layers), desc=title, unit="layer", disable=not progress, leave=False)
    for node in list(graph.graph.nodes):
        if node.op == "output":
            break
        for batch, (reference, values) in enumerate(zip(floats, integers, strict=True)):
            if node.op == "placeholder":
                x = next(given[batch])
                values[node] = given_input(node, x)
                reference[node] = given_input(node, x) if is_written(node) else values[node]
            elif node.op == "get_attr":
                values[node] = attribute(graph, node)
                reference[node] = attribute(graph, node) if is_written(node) else float_weight(node, values[node])
            elif node in weights and batch:
                reference[node], values[node] = floats[0][node], integers[0][node]
            elif node.op == "call_module":
                _call(graph, node, reference, values)
                values[node] = _own(node, reference, values, written)
            else:
                same = all(reference[n] is values[n] for n in node.all_input_nodes)
                reference[node] = evaluate(node, reference)
                if node not in layers:
                    values[node] = reference[node] if same else evaluate(node, values)
                    values[node] = _own(node, reference, values, written)
        if node in layers:
            yield LayerPair(layers[node], floats, integers)
            _reread(graph, layers[node], integers)
            bar.update()
        for values in (*floats, *integers):
            for read in dead.get(node, ()):
                values.pop(read, None)
    bar.close()


def _call(graph: GraphModule, node: Node, reference: Values, values: Values) -> None:
    observer = observer_of(node, graph)
    if observer is None:
        module = graph.get_submodule(str(node.target))
        for env in (reference, values):
            env[node] = module(*(env[n] for n in node.all_input_nodes))
        return
    observed: Node = node.args[0]  # type: ignore[assignment]
    reference[node] = reference[observed]
    values[node] = quantized(observer, values[observed], node.users)


def _own(node: Node, reference: Values, values: Values, written: set[Node]) -> Any:
    """The value of ``node`` in the integer network, a copy where both networks would write into one tensor."""
    if node not in written or values[node] is not reference[node]:
        return values[node]
    return pytree.tree_map_only(torch.Tensor, torch.clone, values[node])


def _reread(graph: GraphModule, layer: Layer, integers: list[Values]) -> None:
    """The layer's output in the integer network, of the weight and bias that ``graph`` has now."""
    weight = quantized(observer_of(layer.weight, graph), attribute(graph, layer.weight.args[0]))  # type: ignore[arg-type]
    for values in integers:
        values[layer.weight] = weight
        if layer.bias is not None:
            values[layer.bias] = attribute(graph, layer.bias)
        values[layer.node] = evaluate(layer.node, values)
