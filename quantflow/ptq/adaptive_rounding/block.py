"""AdaRound for a block of layers: learns the rounding of all their weights at once on the block's outputs (BRECQ)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import node_argument
from quantflow.observers.observation import qparams_of
from quantflow.ptq.adaptive_rounding.block_reconstruction import NoReconstructionError, Reconstruction, RowGradients
from quantflow.ptq.adaptive_rounding.blocks import Block
from quantflow.ptq.adaptive_rounding.soft_rounding import SoftRounding, descend
from quantflow.ptq.writing import write_weight
from quantflow.simulation.fake_quantized import fake_quantized
from quantflow.simulation.float_weights import attribute
from quantflow.simulation.paired_interpreter import MEMORY, LayerPair
from quantflow.simulation.quantized_layers import Layer

_EXAMPLES = 32  # per step
# The weight of the error, relative to that of a single layer: with more, many weights end between their integers, and jump.
_SHARE = 0.1
# Least number of output elements per learned weight: with fewer, as at logits, the block's error falls and the network's rises.
_NUMBERS = 0.25


def round_block(
    graph: GraphModule,
    block: Block,
    pair: LayerPair,
    layers: dict[Node, Layer],
    gradients: RowGradients,
    iterations: int,
) -> tuple[list[Node], list[Node]]:
    """Round the weights of ``block`` in ``graph`` if that increases the error at none of its outputs.

    The error is measured on all batches and, if there are several, on the last quarter, which is held out (at least one batch).

    Args:
        graph: A prepared and calibrated graph; weights and their observers change in place.
        block: What to round.
        pair: Both networks at the block's first layer.
        layers: Of the graph, by node.
        gradients: Of the errors in layers' rows.
        iterations: Steps of Adam.

    Returns:
        The layers whose weights do not change: those quantized exactly already, and those for which no better rounding was
        found.

    Raises:
        NoReconstructionError: when the block can't be learned as a whole.
    """
    roundings = {layers[node]: SoftRounding.of(graph, layers[node]) for node in block.layers}
    fixed = [layer for layer, rounding in roundings.items() if rounding.is_fixed(_nearest(graph, layer))]
    for layer in fixed:
        del roundings[layer]
    if not roundings:
        return [layer.node for layer in fixed], []
    task = Reconstruction(graph, block, pair, layers, gradients)
    before, seen = _errors(task, {}), max(1, 3 * task.batches // 4)
    error = _error(task, before[:seen].sum(0), roundings, seen)
    try:
        learned = descend(list(roundings.values()), error, iterations)
    except RuntimeError as failure:
        raise NoReconstructionError(f"it has no gradient: {str(failure).splitlines()[0]}") from failure
    found = dict(zip(roundings, learned, strict=True))
    after = _errors(task, found)
    better = all((after[part].sum(0) <= before[part].sum(0)).all() for part in (slice(None), slice(seen, None)))
    for layer, weight in found.items() if better else ():
        write_weight(graph, layer, weight, qparams_of(layer.observer))
    return [layer.node for layer in fixed], [] if better else [layer.node for layer in found]


def _error(
    task: Reconstruction, start: torch.Tensor, roundings: dict[Layer, SoftRounding], seen: int
) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """The loss: the error on some of the first ``seen`` batches, in units of ``start`` at each output."""
    drawn = min(seen, -(-_EXAMPLES // task.examples), MEMORY // task.bytes)
    count = sum(rounding.weight.numel() for rounding in roundings.values())
    if not drawn:
        raise NoReconstructionError("it is too large for memory")
    if task.numbers(seen) < _NUMBERS * count:
        raise NoReconstructionError("its outputs have too few elements to learn its weights from")
    if not start.isfinite().all():
        raise NoReconstructionError("its errors are not finite")
    random = torch.Generator().manual_seed(0)
    weight = torch.where(start > 0, _SHARE * count * seen / (drawn * len(start) * start), 0.0)

    def error(soft: list[torch.Tensor]) -> torch.Tensor:
        weights = dict(zip(roundings, soft, strict=True))
        few = torch.randperm(seen, generator=random)[:drawn].tolist()
        return (torch.stack([task.errors(batch, weights) for batch in few]).sum(0) * weight).sum()

    return error


def _errors(task: Reconstruction, weights: dict[Layer, torch.Tensor]) -> torch.Tensor:
    """The errors of each batch and output, [batches, ends]."""
    return torch.stack([task.errors(batch, weights) for batch in range(task.batches)])


def _nearest(graph: GraphModule, layer: Layer) -> torch.Tensor:
    weight = attribute(graph, node_argument(layer.weight))
    return layer.matrices(fake_quantized(layer.observer, weight))
