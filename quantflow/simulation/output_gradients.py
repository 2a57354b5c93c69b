"""What an error costs: how far an error in each activation moves the outputs of the network, to first order.

Outputs move by ``J·e`` for an error ``e`` in an activation with Jacobian ``J``. For random signs ``r``, one for each output,
the expectation of ``(gᵀe)²`` with the gradient ``g = Jᵀr`` is ``|J·e|²`` (Hutchinson's estimator), so that one backward pass
of the float network gradients every error in every activation at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from tqdm import tqdm

from quantflow.data.sample import Inputs
from quantflow.graph.state import aliased_by, is_written
from quantflow.observers.observation import observer_of
from quantflow.simulation.float_weights import attribute, float_weight, given_input
from quantflow.simulation.interpreter import Values, evaluate, float_outputs, has_grid, last_reads
from quantflow.simulation.quantized_layers import Layer, quantized_layers

BINS = 1024
ROWS = 256  # a layer's rows for each example
_FLOOR = 1e-3  # of the mean weight of a row: what no gradient reaches now may matter a little


@dataclass
class ValueGradients:
    """Gradients by value, for the tensors of one observer between the extremes that it saw.

    Attributes:
        low: The lower end of the bins.
        high: The upper end.
        sums: Sum of the gradients in each bin, one row an example: saturation moves all of a bin alike. [examples, bins]
        squares: Sum of their squares over all examples: rounding errors add up as noise. Exact zeros have none. [bins]
    """

    low: float
    high: float
    sums: list[torch.Tensor] = field(default_factory=list)
    squares: torch.Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.float64))


@dataclass
class OutputGradients:
    """Of every activation of a graph.

    Attributes:
        values: By observer.
        rows: By layer, for each batch, the squared gradient of each drawn row of its output. [groups, rows]
    """

    values: dict[nn.Module, ValueGradients] = field(default_factory=dict)
    rows: dict[Node, list[torch.Tensor]] = field(default_factory=dict)


def output_gradients(graph: GraphModule, sample: Sequence[Inputs], *, progress: bool = True) -> OutputGradients:
    """Price errors by one forward and one backward pass of the float network over ``sample``.

    Args:
        graph: A prepared and calibrated graph.
        sample: Batches of flat inputs.
        progress: Show a progress bar.
    """
    found = OutputGradients()
    layers = quantized_layers(graph)
    bar = tqdm(sample, desc="output gradients", unit="batch", disable=not progress, leave=False)
    for number, batch in enumerate(bar):
        _one_batch(graph, layers, batch, number, found)
    return found


def row_weights(
    gradients: list[torch.Tensor] | None, batch: int, shape: Sequence[int], like: torch.Tensor
) -> torch.Tensor:
    """How much each of a layer's rows in a batch counts, [groups, rows], about one on average.

    Args:
        gradients: Of the layer, one of :attr:`OutputGradients.rows`. All rows count alike without them, or where these do not
            fit ``shape``.
        batch: The number of the batch.
        shape: Groups and rows.
        like: Tells dtype and device.
    """
    if gradients is None or batch >= len(gradients) or gradients[batch].shape != tuple(shape):
        return torch.ones(*shape, dtype=like.dtype, device=like.device)
    mean = torch.cat(gradients, 1).mean(1, keepdim=True)
    weights = gradients[batch] / mean.clamp(min=torch.finfo(mean.dtype).tiny)
    return (weights.to(like) + _FLOOR) / (1 + _FLOOR)


Moved = dict[tuple[nn.Module, int], torch.Tensor]  # by observer and number of rows


def _one_batch(
    graph: GraphModule, layers: dict[Node, Layer], batch: tuple, number: int, found: OutputGradients
) -> None:
    dead = last_reads(graph.graph)
    given, returned = iter(batch), []
    values: Values = {}
    moved: Moved = {}
    with torch.enable_grad():
        for node in graph.graph.nodes:
            if node.op == "output":
                returned = float_outputs(node, values)
            else:
                values[node] = float_value(graph, node, values, given)
            x = values.get(node)
            if isinstance(x, torch.Tensor) and x.requires_grad:
                if node in layers:
                    values[node] = x = x.view_as(x)  # what comes next may write into it
                    _keep_row_gradients(layers[node], x, number, found)
                elif (observer := observer_of(node, graph)) is not None:
                    values[node] = x = x.view_as(x)
                    _keep_value_gradients(observer, x, moved, found)
            for read in dead.get(node, ()):
                values.pop(read, None)
        outputs = [y for y in returned if y.requires_grad]
        random = torch.Generator().manual_seed(number)
        torch.autograd.backward(outputs, [random_signs(y, random) for y in outputs])
    for (observer, _), sums in moved.items():
        found.values[observer].sums.append(sums.float())


def float_value(graph: GraphModule, node: Node, values: Values, given: Any) -> Any:
    """The value of ``node`` in the float network; what is given to it, and what it makes of integers, requires a gradient."""
    if node.op == "placeholder":
        x = next(given)
        floating = isinstance(x, torch.Tensor) and x.is_floating_point()
        return given_input(node, x.detach().clone().requires_grad_() if floating else x)  # a leaf can't be written
    if node.op == "get_attr":
        return float_weight(node, attribute(graph, node))
    if node.op == "call_function":
        x = evaluate(node, values)
        floating = torch.is_grad_enabled() and isinstance(x, torch.Tensor) and x.is_floating_point()
        if floating and not x.requires_grad and any(n.op != "get_attr" for n in node.all_input_nodes):
            return _with_gradient(node, x)  # as an embedding of token numbers
        return x
    if observer_of(node, graph) is not None:
        return values[node.args[0]]  # type: ignore[index]
    return graph.get_submodule(str(node.target))(*(values[a] for a in node.all_input_nodes))


def _with_gradient(node: Node, x: torch.Tensor) -> torch.Tensor:
    """``x``, which depends on no gradient, as the start of one; a leaf, unless ``node`` is written later."""
    if not is_written(node):
        return x.detach().requires_grad_()
    # A part of an older tensor is written there, and has a gradient once something with one is written.
    return x if aliased_by(node) is not None else x.detach().requires_grad_().clone()


def random_signs(y: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Random signs for a gradient of the output ``y``, of which every output gets its share whatever its unit."""
    signs = torch.randint(0, 2, y.shape, generator=random).to(y) * 2 - 1
    return signs / y.detach().square().mean().sqrt().clamp(min=1e-12)


def _keep_row_gradients(layer: Layer, y: torch.Tensor, number: int, found: OutputGradients) -> None:
    index = layer.draw(y, number, ROWS)
    rows = found.rows.setdefault(layer.node, [])

    def keep(gradient: torch.Tensor) -> None:
        rows.append(layer.outputs(gradient, index).square().sum(-1))

    y.register_hook(keep)


def _keep_value_gradients(observer: nn.Module, y: torch.Tensor, moved: Moved, found: OutputGradients) -> None:
    if not has_grid(observer) or getattr(observer, "is_dynamic", False) or not hasattr(observer, "min_val"):
        return
    low, high = float(observer.min_val.min().clamp(max=0.0)), float(observer.max_val.max().clamp(min=0.0))
    if not low < high:
        return
    of_value = found.values.setdefault(observer, ValueGradients(low, high))
    x = y.detach()
    x = x.flatten(1) if x.ndim > 1 else x.reshape(1, -1)
    place = ((x - low) * (BINS / (high - low))).to(torch.int32).clamp_(0, BINS - 1)
    place += BINS * torch.arange(len(x), dtype=torch.int32, device=x.device)[:, None]
    exact = x == 0

    def keep(gradient: torch.Tensor) -> None:
        flat = gradient.reshape(x.shape).masked_fill(exact, 0.0).flatten()
        counted = {"minlength": BINS * len(x)}
        sums = torch.bincount(place.flatten(), weights=flat, **counted).view(-1, BINS).double().cpu()
        # Values of one range add up by example; where the examples lie along another dimension, rows are what there is.
        moved[observer, len(x)] = moved[observer, len(x)] + sums if (observer, len(x)) in moved else sums
        squares = torch.bincount(place.flatten(), weights=flat.square_(), **counted)
        of_value.squares += squares.view(-1, BINS).sum(0).double().cpu()

    y.register_hook(keep)
