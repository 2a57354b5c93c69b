"""Block reconstruction: the error of a block's outputs in the integer network against the float network."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node

from quantflow.graph.aten import INFERENCE_IDENTITIES, aten, clamp_limits, is_view, node_argument, only_user, op, value
from quantflow.graph.state import writes_for_others
from quantflow.observers import FixedQParamsObserver
from quantflow.observers.observation import observer_of, qparams_of
from quantflow.ptq.adaptive_rounding.blocks import Block
from quantflow.simulation.fake_quantized import is_affine
from quantflow.simulation.float_weights import attribute
from quantflow.simulation.interpreter import Interpreter, Values
from quantflow.simulation.output_gradients import row_weights
from quantflow.simulation.paired_interpreter import LayerPair
from quantflow.simulation.quantized_layers import Layer
from quantflow.upstream import pytree

RowGradients = dict[str, list[torch.Tensor]]  # a layer's rows, by the name of its node

_SUMS = frozenset({aten.add.Tensor, aten.sub.Tensor})


class NoReconstructionError(Exception):
    """Why a block can't be learned as a whole."""


class Reconstruction:
    """The outputs of a block in the integer network against its outputs in the float network.

    Args:
        graph: The prepared and calibrated graph.
        block: The block. Its nodes before its first layer have been computed.
        pair: Both networks at that layer.
        layers: The layers of the graph, by node.
        gradients: The squared gradients of rows, by the name of the layer's node. They weight the errors at an end that only
            clamps and sums separate from its last layer. At another end all errors have equal weight.

    Attributes:
        batches: The number of batches.
        examples: About how many examples a batch holds.
        bytes: About how many bytes a gradient through the block holds for one batch.

    Raises:
        NoReconstructionError: where the block has no float output, or none that is finite, or writes into what others read.
    """

    def __init__(
        self, graph: GraphModule, block: Block, pair: LayerPair, layers: dict[Node, Layer], gradients: RowGradients
    ) -> None:
        self._given, self.bytes = pair.integers, 0
        self._nodes = block.nodes[block.nodes.index(pair.layer.node) :]
        self._ends = [node for node in block.ends if node in self._nodes]
        if any(writes_for_others(node) for node in self._nodes):
            raise NoReconstructionError("it writes in place into what others read")
        constants = [node for node in self._nodes if node in block.constants]
        network, before = Interpreter(graph, quantize=True), dict(pair.integers[0])
        self._constants = {n: values[n] for n, values in network.run(nodes=constants, values=before, keep=True)}
        observed = {node: observer_of(node, graph) for node in self._nodes if node not in self._constants}
        fixed = {node: _fixed(observer) for node, observer in observed.items() if observer is not None}
        self._integers = Interpreter(graph, quantize=True, observers=fixed)
        self._wanted = [self._ends_in_float(Interpreter(graph, float_weights=True), values) for values in pair.floats]
        if not self._ends or not all(end.isfinite().all() for ends in self._wanted for end in ends):
            raise NoReconstructionError("none of its outputs is a finite float tensor")
        self.batches, first = len(self._wanted), self._wanted[0][0]
        self.examples = first.shape[0] if first.ndim else 1
        inside = [layers[node] for node in block.layers]
        self._shapes = {layer: attribute(graph, node_argument(layer.weight)).shape for layer in inside}
        self._gradients_at = [_gradients_at(end, graph, inside, gradients) for end in self._ends]

    def errors(self, batch: int, weights: dict[Layer, torch.Tensor]) -> torch.Tensor:
        """The sum of squared errors at each end, [ends], for one batch.

        Args:
            batch: Its number.
            weights: Quantized weights, [groups, outputs, features]; those of other layers are what they were.
        """
        known = self._constants | {layer.weight: w.reshape(self._shapes[layer]) for layer, w in weights.items()}
        values, found = {**self._given[batch], **known}, Values()
        for node, alive in self._integers.run(nodes=self._nodes, values=values, known=known):
            if node in self._ends:
                found[node] = alive[node]
        ends = zip((found[end] for end in self._ends), self._wanted[batch], self._gradients_at, strict=True)
        return torch.stack([_squares(y - wanted, batch, at_end) for y, wanted, at_end in ends])

    def numbers(self, batches: int) -> int:
        """The number of elements of the block's outputs for the first ``batches``."""
        return sum(end.numel() for ends in self._wanted[:batches] for end in ends)

    def _ends_in_float(self, network: Interpreter, before: Values) -> list[torch.Tensor]:
        found, held = Values(), 0
        for node, values in network.run(nodes=self._nodes, values=dict(before)):
            if node not in self._constants and not is_view(node):
                leaves = pytree.tree_leaves(values[node])
                held += sum(t.numel() * t.element_size() for t in leaves if isinstance(t, torch.Tensor))
            if node in self._ends:
                found[node] = values[node]
        self.bytes = max(self.bytes, held)
        return [found[end] for end in self._ends]


def _fixed(observer: nn.Module) -> nn.Module:
    """An observer with fixed quantization parameters, which are not computed again."""
    if getattr(observer, "is_dynamic", False) or not is_affine(observer):
        return observer
    return FixedQParamsObserver.like(observer, *qparams_of(observer))


def _gradients_at(
    end: Node, graph: GraphModule, layers: list[Layer], gradients: RowGradients
) -> tuple[Layer, list[torch.Tensor]] | None:
    """A layer with only clamps and sums between it and ``end``, so that its gradients hold there, and its gradients."""
    for layer in layers:
        node: Node | None = layer.node
        while node is not None and node is not end:
            follower = only_user(node)
            node = follower if follower is not None and _passes(follower, layer.node, graph) else None
        if node is end and layer.node.name in gradients:
            return layer, gradients[layer.node.name]
    return None


def _passes(node: Node, layer: Node, graph: GraphModule) -> bool:
    if observer_of(node, graph) is not None:
        return True
    given, found = value(layer), value(node)
    alike = given is not None and found is not None and given.shape == found.shape
    return alike and (op(node) in _SUMS or op(node) in INFERENCE_IDENTITIES or clamp_limits(node) is not None)


def _squares(error: torch.Tensor, batch: int, row_gradients: tuple[Layer, list[torch.Tensor]] | None) -> torch.Tensor:
    if row_gradients is None:
        return error.square().sum()
    layer, gradients = row_gradients
    index = layer.draw(error, batch)
    rows = layer.outputs(error, index)
    return (rows.square().sum(-1) * row_weights(gradients, batch, rows.shape[:2], error)).sum()
