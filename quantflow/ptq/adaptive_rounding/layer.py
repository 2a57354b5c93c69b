"""AdaRound for one layer: learns the rounding of its weight on its own output."""

from __future__ import annotations

import math

import torch
from torch.fx import GraphModule

from quantflow.graph.aten import clamp_limits, only_user
from quantflow.observers.observation import qparams_of
from quantflow.ptq.adaptive_rounding.learned_rounding import Rows, learn_rounding
from quantflow.ptq.adaptive_rounding.soft_rounding import SoftRounding
from quantflow.ptq.writing import write_weight
from quantflow.simulation.output_gradients import row_weights
from quantflow.simulation.paired_interpreter import LayerPair

_LEARNED = 64  # rows of an example that are learned on


def round_layer(graph: GraphModule, pair: LayerPair, gradients: list[torch.Tensor] | None, iterations: int) -> bool:
    """Round the weight of the layer at ``pair`` in ``graph``; return False if there is nothing to learn.

    An output keeps nearest rounding where that has the smaller error on all rows, or on the held-out quarter.

    Args:
        graph: A prepared and calibrated graph; the weight and its observer change in place.
        pair: The layer in both networks.
        gradients: Of the layer's rows, one of :attr:`quantflow.simulation.output_gradients.OutputGradients.rows`.
        iterations: Steps of Adam.
    """
    layer = pair.layer
    rounding, nearest = SoftRounding.of(graph, layer), layer.matrices(pair.integers[0][layer.weight])
    rows = _rows(pair, gradients)
    if rounding.is_fixed(nearest) or not all(t.isfinite().all() for t in (rows.x, rows.y)):
        return False
    learned = -(-3 * rows.x.shape[1] // 4)
    found = learn_rounding(rounding, rows[:learned], iterations=iterations)
    held_out_parts = [rows, rows[learned:]] if learned < rows.x.shape[1] else [rows]
    better = torch.stack([held_out.error(found) <= held_out.error(nearest) for held_out in held_out_parts]).all(0)
    write_weight(graph, layer, torch.where(better[..., None], found, nearest), qparams_of(layer.observer))
    return True


def _rows(pair: LayerPair, gradients: list[torch.Tensor] | None) -> Rows:
    """Rows of the integer network's inputs and of the float network's outputs, in the order of the batches."""
    layer, found = pair.layer, []
    for batch, (reference, values) in enumerate(zip(pair.floats, pair.integers, strict=True)):
        y = reference[layer.node]
        index = layer.draw(y, batch)
        weights = row_weights(gradients, batch, (layer.groups, len(index)), y)
        few = slice(None, None, layer.rows // _LEARNED if len(index) > layer.rows else 1)
        index = index[few]
        found.append((layer.inputs(values[layer.source], y, index), layer.outputs(y, index), weights[:, few]))
    x, y, weights = (torch.cat(part, 1) for part in zip(*found, strict=True))
    bias = y.new_zeros(layer.groups, 1, y.shape[2])
    if layer.bias is not None:
        bias = pair.integers[0][layer.bias].reshape(bias.shape)
    follower = only_user(layer.node)
    limits = (None if follower is None else clamp_limits(follower)) or (-math.inf, math.inf)
    return Rows(x, y.clamp(*limits), weights, bias, limits)
