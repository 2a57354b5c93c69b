"""Weights and biases that make good what quantizing does to a layer's inputs and to its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from tqdm import tqdm

from quantflow.aten import set_argument
from quantflow.graph_module import TrainableGraphModule, adopt
from quantflow.observation import observer_of
from quantflow.observers import SettledObserver
from quantflow.parameters import read_attribute, set_tensor, tensor_of, unused_name
from quantflow.qparams import PER_CHANNEL, SYMMETRIC, choose_qparams
from quantflow.recovery.gptq import output_error, round_weights
from quantflow.recovery.layers import Layer, quantized_layers
from quantflow.recovery.least_squares import correction
from quantflow.recovery.moments import Moments
from quantflow.recovery.sample import Inputs
from quantflow.recovery.sensitivity import ROWS, Sensitivity
from quantflow.recovery.walk import Values, attribute, evaluate, last_reads, quantized

_FLOOR = 1e-3  # of the mean weight of a row: what no gradient reaches now may matter a little
_SHRINK = torch.linspace(1.0, 0.5, 21, dtype=torch.float64)
_FINE = 64  # levels from which on shrinking a weight's range brings nothing


@torch.no_grad()
def compensate(
    graph: GraphModule, sample: Sequence[Inputs], prices: Sensitivity | None = None, *, progress: bool = True
) -> TrainableGraphModule:
    """A copy of ``graph`` whose layers reproduce their float outputs from quantized inputs, with weights on their grids.

    One walk, layer by layer, in which the float network and the integer network run side by side. Each layer's weight is
    fitted by ridge regression to its float output, given the inputs as the integer network has them; rounded by GPTQ; and
    its bias takes what is left of the mean error (Nagel et al. 2019, arXiv:1906.04721, section 4.2). Rows count by how much
    the network's output depends on them. (Fitting to quantized inputs: Nagel et al. 2020, AdaRound, arXiv:2004.10568,
    section 3.5; Zhang et al. 2025, Qronos, arXiv:2505.11695.)

    Args:
        graph: A prepared and calibrated graph; it is left as it was.
        sample: Batches of flat inputs, two or more; of one, weights are rounded but not fitted.
        prices: What :func:`quantflow.recovery.sensitivity` found on the same sample; without, all rows count alike.
        progress: Show a progress bar.
    """
    graph = adopt(graph).eval()
    rows = {} if prices is None else {node.name: found for node, found in prices.rows.items()}
    layers = quantized_layers(graph)
    weights = {layer.weight for layer in layers.values()}
    dead = last_reads(graph.graph)
    floats: list[Values] = [{} for _ in sample]
    integers: list[Values] = [{} for _ in sample]
    given = [iter(batch) for batch in sample]
    bar = tqdm(total=len(layers), desc="compensate", unit="layer", disable=not progress, leave=False)
    for node in list(graph.graph.nodes):
        if node.op == "output":
            break
        for batch, (reference, values) in enumerate(zip(floats, integers, strict=True)):
            if node.op == "placeholder":
                reference[node] = values[node] = next(given[batch])
            elif node.op == "get_attr":
                reference[node] = values[node] = attribute(graph, node)
            elif node in weights:
                reference[node] = values[node] = reference[node.args[0]]
            elif node.op == "call_module":
                _call(graph, node, reference, values)
            else:
                same = all(reference[n] is values[n] for n in node.all_input_nodes)
                reference[node] = evaluate(node, reference)
                if node not in layers:
                    values[node] = reference[node] if same else evaluate(node, values)
        if node in layers:
            _fit(graph, layers[node], floats, integers, rows.get(node.name))
            for values in integers:
                values[node] = evaluate(node, values)
            bar.update()
        for values in (*floats, *integers):
            for read in dead.get(node, ()):
                values.pop(read, None)
    bar.close()
    graph.recompile()
    return graph


def _call(graph: GraphModule, node: Node, reference: Values, values: Values) -> None:
    observer = observer_of(node, graph)
    if observer is None:
        module = graph.get_submodule(str(node.target))
        for env in (reference, values):
            env[node] = module(*(env[n] for n in node.all_input_nodes))
        return
    observed: Node = node.args[0]  # type: ignore[assignment]
    reference[node] = reference[observed]
    values[node] = quantized(observer, values[observed])


def _fit(
    graph: GraphModule, layer: Layer, floats: list[Values], integers: list[Values], prices: list[torch.Tensor] | None
) -> None:
    """Give ``layer`` the weight and the bias that fit, in the graph and in the values of the walk."""
    weight = tensor_of(graph, layer.weight.args[0]).detach()  # type: ignore[arg-type]
    matrices = layer.matrices(weight)
    halves: list[Moments | None] = [None, None]
    shift: torch.Tensor | None = None
    for batch, (reference, values) in enumerate(zip(floats, integers, strict=True)):
        y = reference[layer.node]
        index = layer.draw(y, batch, ROWS)
        x = layer.inputs(values[layer.source], y, index)
        bias = 0.0 if layer.bias is None else values[layer.bias].reshape(layer.groups, 1, -1)
        residual = layer.outputs(y, index) - x @ matrices.transpose(1, 2) - bias
        shift = x.mean(1, keepdim=True) if shift is None else shift
        moments = Moments.of(x, residual, _row_weights(prices, batch, x), shift)
        half = halves[batch % 2]
        halves[batch % 2] = moments if half is None else half + moments
    first, second = halves
    assert first is not None
    whole = first if second is None else first + second
    if not all(t.isfinite().all() for t in (whole.xx, whole.xr)):
        return
    fitted = matrices.double() + (0.0 if second is None else correction(first, second))
    grid = _grid(layer, fitted, whole, weight)
    limits: Any = (layer.observer.quant_min, layer.observer.quant_max)
    scale, zero_point = (_by_output(q, layer, weight) for q in grid)
    rounded = round_weights(fitted, whole.covariance, scale, zero_point, *limits)
    change = rounded - matrices
    bias = whole.mean_r - whole.mean_x @ change.transpose(1, 2)
    _write(graph, layer, rounded.reshape(weight.shape).to(weight), bias.reshape(-1), grid, integers)


def _row_weights(prices: list[torch.Tensor] | None, batch: int, x: torch.Tensor) -> torch.Tensor:
    """The weight of each row, [groups, rows], about one on average."""
    if prices is None or batch >= len(prices) or prices[batch].shape != x.shape[:2]:
        return torch.ones(x.shape[:2], dtype=x.dtype, device=x.device)
    mean = torch.cat(prices, 1).mean(1, keepdim=True)
    weights = prices[batch] / mean.clamp(min=torch.finfo(mean.dtype).tiny)
    return (weights.to(x) + _FLOOR) / (1 + _FLOOR)


def _grid(
    layer: Layer, fitted: torch.Tensor, moments: Moments, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point for the fitted weight: its extremes or, where levels are few, what errs least in the output."""
    observer = layer.observer
    limits = {"quant_min": observer.quant_min, "quant_max": observer.quant_max}
    symmetric = observer.qscheme in SYMMETRIC
    per_channel = observer.qscheme in PER_CHANNEL
    by_channel = fitted.reshape(weight.shape[0], -1) if per_channel else fitted.reshape(1, -1)
    low, high = by_channel.amin(1).float(), by_channel.amax(1).float()
    best = torch.ones(low.shape, dtype=torch.float64, device=low.device)
    if observer.quant_max - observer.quant_min < _FINE:  # type: ignore[operator]
        least = torch.full_like(best, float("inf"))
        for factor in _SHRINK:
            grid = choose_qparams(low * factor, high * factor, symmetric=symmetric, **limits)
            scale, zero_point = (_by_output(q if per_channel else q[0], layer, weight) for q in grid)
            integers = (torch.round(fitted / scale) + zero_point).clamp(*limits.values())
            error = output_error((integers - zero_point) * scale - fitted, moments.covariance).reshape(-1)
            error = error if per_channel else error.sum()[None]
            best = torch.where(error < least, factor, best)
            least = torch.minimum(error, least)
    scale, zero_point = choose_qparams((low * best).float(), (high * best).float(), symmetric=symmetric, **limits)
    return (scale, zero_point) if per_channel else (scale[0], zero_point[0])


def _by_output(qparam: torch.Tensor, layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """A scale or zero point, a scalar or one an output, as float64 [groups, outputs a group, 1]."""
    return qparam.double().expand(weight.shape[0]).reshape(layer.groups, -1, 1)


def _write(
    graph: GraphModule,
    layer: Layer,
    weight: torch.Tensor,
    bias: torch.Tensor,
    grid: tuple[torch.Tensor, torch.Tensor],
    integers: list[Values],
) -> None:
    set_tensor(graph, str(layer.weight.args[0].target), weight, parameter=True)  # type: ignore[union-attr]
    graph.set_submodule(str(layer.weight.target), SettledObserver.like(layer.observer, *grid))
    if layer.bias is None:
        name = unused_name(graph, f"{layer.weight.args[0].target!s}_bias")  # type: ignore[union-attr]
        set_tensor(graph, name, bias.to(weight), parameter=True)
        set_argument(layer.node, "bias", read_attribute(graph, name, layer.node, layer.node))
    else:
        name = str(layer.bias.target)
        set_tensor(graph, name, (tensor_of(graph, layer.bias).detach() + bias).to(weight), parameter=True)
    assert layer.bias is not None
    for values in integers:
        values[layer.weight] = weight
        values[layer.bias] = tensor_of(graph, layer.bias).detach()
