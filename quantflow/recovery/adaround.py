"""AdaRound: learning for each weight whether to round it up or down."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import GraphModule

from quantflow.aten import clamp_limits, label, only_user
from quantflow.batches import PickInputs
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.observers.observation import qparams_of
from quantflow.recovery.given import check_calibrated, draw, within_memory
from quantflow.recovery.layers import quantized_layers
from quantflow.recovery.learned_rounding import Rows, learn_rounding
from quantflow.recovery.originals import attribute
from quantflow.recovery.paired_walk import Stop, side_by_side
from quantflow.recovery.sample import Sample
from quantflow.recovery.sensitivity import ROWS, Sensitivity, row_weights
from quantflow.recovery.writing import by_output, write_weight

_STAGE = "adaround"
_EVERY = 4  # of the rows that are priced, one of so many is learned on
_ON_GRID = 1e-3  # steps


@torch.no_grad()
def adaround(
    graph: GraphModule,
    data: Sample | Iterable[Any],
    prices: Sensitivity | None = None,
    *,
    iterations: int = 500,
    inputs: PickInputs | None = None,
    progress: bool = True,
) -> TrainableGraphModule:
    """A copy of ``graph`` whose weights are each rounded up or down as serves the layer's output, not to the nearest.

    One walk, layer by layer: which of the two integers around a weight to take is learned by gradient descent, so that the
    layer reproduces its float output, as the relu or relu6 behind it lets it pass, from the inputs that it gets once they are
    quantized (Nagel et al. 2020, AdaRound, arXiv:2004.10568). The grids stay. An output keeps nearest rounding where that errs
    less on all of the data, or on the quarter of it that nothing was learned on.

    It pays with few levels (4 bits). It hurts where examples are few for the features of a layer, and, without ``prices``,
    where a network has outliers that do not matter to it: these are then what is fitted. A weight that lies on its grid
    already, as after :func:`compensate`, has nothing to learn: call this first. Time is in proportion to ``iterations``.

    Args:
        graph: A prepared and calibrated graph; it is left as it was.
        data: The sample that :func:`quantflow.calibrate` drew, or batches to draw one from; labels are not used.
        prices: What :func:`quantflow.recovery.sensitivity` found on the batches of that sample: places count by how much the
            network's output depends on them. Without, all count alike.
        iterations: Steps of Adam for each layer.
        inputs: Picks the inputs out of a batch, where that is ambiguous.
        progress: Show a progress bar.

    Raises:
        QuantflowError: at stage ``"adaround"``, when the graph is not prepared for PTQ or not calibrated, a batch does not fit
            it, or ``iterations`` is not positive.
    """
    check_calibrated(graph, _STAGE)
    if iterations < 1:
        raise QuantflowError(_STAGE, f"{iterations} steps learn nothing", node="iterations", remedy="500, say")
    rounded = adopt(graph)
    training = rounded.training  # a graph that stock torchao prepared says True in inference mode
    rounded.eval()
    sample = within_memory(rounded, draw(rounded, data, stage=_STAGE, inputs=inputs))
    priced = {} if prices is None else {node.name: found for node, found in prices.rows.items()}
    layers = quantized_layers(rounded)
    left = [node for node in quantized_layers(rounded, solvable=False) if node not in layers]
    for stop in side_by_side(rounded, sample, layers, title="adaround", progress=progress):
        if not _learn(rounded, stop, priced.get(stop.layer.node.name), iterations):
            left.append(stop.layer.node)
    if left:
        reason = (
            "too wide, in groups, on their grid already or not finite: the weights of these layers stay as they are"
        )
        remedy = "nothing to do where that is meant; call adaround before compensate"
        names = ", ".join(label(node) for node in left)
        warnings.warn(QuantflowWarning(_STAGE, reason, node=names, remedy=remedy), stacklevel=2)
    rounded.recompile()
    return rounded.train(training)


def _learn(graph: GraphModule, stop: Stop, prices: list[torch.Tensor] | None, iterations: int) -> bool:
    """Round the weight of the layer at ``stop``; False where there is nothing to learn."""
    layer, observer = stop.layer, stop.layer.observer
    weight = attribute(graph, layer.weight.args[0])  # type: ignore[arg-type]
    grid = qparams_of(observer)
    scale, zero_point = (by_output(q.to(weight.device), layer, weight).to(weight) for q in grid)
    matrices, nearest = layer.matrices(weight), layer.matrices(stop.integers[0][layer.weight])
    rows = _rows(stop, prices)
    if ((matrices - nearest) / scale).abs().max() < _ON_GRID or not all(t.isfinite().all() for t in (rows.x, rows.y)):
        return False
    limits: Any = (observer.quant_min, observer.quant_max)
    learned = -(-3 * rows.x.shape[1] // 4)
    found = learn_rounding(matrices, rows[:learned], scale, zero_point, *limits, iterations=iterations)
    judges = [rows, rows[learned:]] if learned < rows.x.shape[1] else [rows]
    better = torch.stack([judge.error(found) <= judge.error(nearest) for judge in judges]).all(0)
    write_weight(graph, layer, torch.where(better[..., None], found, nearest), grid)
    return True


def _rows(stop: Stop, prices: list[torch.Tensor] | None) -> Rows:
    """Rows of the integer network's inputs and of the float network's outputs, in the order of the batches."""
    layer, found = stop.layer, []
    for batch, (reference, values) in enumerate(zip(stop.floats, stop.integers, strict=True)):
        y = reference[layer.node]
        index = layer.draw(y, batch, ROWS)
        weights = row_weights(prices, batch, (layer.groups, len(index)), y)
        few = slice(None, None, _EVERY if len(index) > ROWS else 1)
        index = index[few]
        found.append((layer.inputs(values[layer.source], y, index), layer.outputs(y, index), weights[:, few]))
    x, y, weights = (torch.cat(part, 1) for part in zip(*found, strict=True))
    bias = y.new_zeros(layer.groups, 1, y.shape[2])
    if layer.bias is not None:
        bias = stop.integers[0][layer.bias].reshape(bias.shape)
    follower = only_user(layer.node)
    limits = (None if follower is None else clamp_limits(follower)) or (-math.inf, math.inf)
    return Rows(x, y.clamp(*limits), weights, bias, limits)
