"""AdaRound for a block: rounding the weights of all its layers at once so that what it puts out comes right (BRECQ)."""

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
from quantflow.simulation.paired_interpreter import LayerPair
from quantflow.simulation.preconditions import MEMORY
from quantflow.simulation.quantized_layers import Layer

_EXAMPLES = 32  # a step's
_SHARE = (
    0.1  # of the error that a layer's would count: with more, many weights end between their integers, and then jump
)
_NUMBERS = (
    0.25  # at the ends, for each weight to learn; with fewer, as logits are, the block errs less and the network more
)


def round_block(
    graph: GraphModule,
    block: Block,
    pair: LayerPair,
    layers: dict[Node, Layer],
    gradients: RowGradients,
    iterations: int,
) -> tuple[list[Node], list[Node]]:
    """Round the weights of ``block`` in ``graph``, if it then errs no more at any of its ends.

    Judged on all batches and, where there are several, on the last quarter, which nothing is learned on (one batch at least).

    Args:
        graph: A prepared and calibrated graph; weights and their observers change in place.
        block: What to round.
        pair: Where the walk stands: at the block's first layer.
        layers: Of the graph, by node.
        gradients: Of the errors in layers' rows.
        iterations: Steps of Adam.

    Returns:
        The layers that stay: those on their grid already, and the others where no rounding was found that is better.

    Raises:
        NoReconstructionError: where the block can't be learned as one.
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
    """What to descend: the error on a few of the first ``seen`` batches, in units of ``start`` at each end."""
    drawn = min(seen, -(-_EXAMPLES // task.examples), MEMORY // task.bytes)
    count = sum(rounding.weight.numel() for rounding in roundings.values())
    if not drawn:
        raise NoReconstructionError("it is too large to hold")
    if task.numbers(seen) < _NUMBERS * count:
        raise NoReconstructionError("it ends in too few numbers to learn its weights from")
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
    """Of each batch and end."""
    return torch.stack([task.errors(batch, weights) for batch in range(task.batches)])


def _nearest(graph: GraphModule, layer: Layer) -> torch.Tensor:
    weight = attribute(graph, node_argument(layer.weight))
    return layer.matrices(fake_quantized(layer.observer, weight))
