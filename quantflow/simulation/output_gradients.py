"""Output gradients: how far an error in each activation moves the outputs of the network, to first order.

Outputs move by ``J·e`` for an error ``e`` in an activation with Jacobian ``J``. For random signs ``r``, one for each output,
the expectation of ``(gᵀe)²`` with the gradient ``g = Jᵀr`` is ``|J·e|²`` (Hutchinson's estimator), so one backward pass of
the float network gives the cost of an error in every activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.fx import GraphModule, Node
from tqdm import tqdm

from quantflow.data.sample import Inputs
from quantflow.observers.observation import affine, observer_of
from quantflow.simulation.fake_quantized import is_affine
from quantflow.simulation.interpreter import Interpreter, float_tensors
from quantflow.simulation.quantized_layers import Layer, quantized_layers

BINS = 1024
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
    """The gradients of the outputs at every activation of a graph, as :func:`output_gradients` finds them.

    Attributes:
        values: By observer, the gradients by value of the tensors that it observes.
        rows: By layer, for each batch, the squared gradient of each drawn row of its output, [groups, rows].

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantflow.ptq import output_gradients
        >>> from quantizers import XNNPACKQuantizer
        >>> model, sample = torch.nn.Linear(8, 4).eval(), qf.Sample()
        >>> graph = qf.export(model, (torch.randn(1, 8),), dynamic_batch=True).module()
        >>> prepared = qf.prepare(graph, XNNPACKQuantizer())
        >>> _ = qf.calibrate(prepared, [torch.randn(16, 8)], sample=sample, progress=False)
        >>> gradients = output_gradients(prepared, sample.batches(), progress=False)
        >>> len(gradients.values), [layer.name for layer in gradients.rows]
        (2, ['linear'])
    """

    values: dict[nn.Module, ValueGradients] = field(default_factory=dict)
    rows: dict[Node, list[torch.Tensor]] = field(default_factory=dict)


def output_gradients(graph: GraphModule, sample: Sequence[Inputs], *, progress: bool = True) -> OutputGradients:
    """Find how much errors in each activation move the outputs, by a forward and a backward pass of the float network.

    The outputs get random signs (Hutchinson's estimator): the expectation of the squared gradient is the squared change of
    the outputs, to first order.

    Args:
        graph: A prepared and calibrated graph.
        sample: Batches of flat inputs, as ``Sample.batches()`` returns them.
        progress: Show a progress bar.

    Returns:
        The gradients, by observer and by layer.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantflow.ptq import output_gradients
        >>> from quantizers import XNNPACKQuantizer
        >>> model, sample = torch.nn.Linear(8, 4).eval(), qf.Sample()
        >>> graph = qf.export(model, (torch.randn(1, 8),), dynamic_batch=True).module()
        >>> prepared = qf.prepare(graph, XNNPACKQuantizer())
        >>> _ = qf.calibrate(prepared, [torch.randn(16, 8)], sample=sample, progress=False)
        >>> gradients = output_gradients(prepared, sample.batches(), progress=False)
        >>> len(gradients.values)  # of the input and of the output
        2
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
    returned_floats: list[torch.Tensor] = []
    moved: Moved = {}
    with torch.enable_grad():
        for node, values in Interpreter(graph, float_weights=True, gradients=True).run(batch):
            if node.op == "output":
                returned_floats = float_tensors(values[node])
                break
            x, observer = values[node], observer_of(node, graph)
            if isinstance(x, torch.Tensor) and x.requires_grad and (node in layers or observer is not None):
                values[node] = x = x.view_as(x)  # what comes next may write into it
                if node in layers:
                    _keep_row_gradients(layers[node], x, number, found)
                elif observer is not None:
                    _keep_value_gradients(observer, x, moved, found)
        outputs = [y for y in returned_floats if y.requires_grad]
        random = torch.Generator().manual_seed(number)
        torch.autograd.backward(outputs, [random_signs(y, random) for y in outputs])
    for (observer, _), sums in moved.items():
        found.values[observer].sums.append(sums.float())


def random_signs(y: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Random signs for a gradient of the output ``y``, of which every output gets its share whatever its unit.

    The unit is the root mean square of what is not zero: of a cache, most values do not change.
    """
    signs = torch.randint(0, 2, y.shape, generator=random).to(y) * 2 - 1
    power = y.detach().square().nan_to_num(0.0, 0.0)
    unit = (power.sum() / power.count_nonzero().clamp(min=1)).sqrt().clamp(min=1e-12)
    return torch.where(y.detach().isfinite(), signs / unit, 0.0)


def _keep_row_gradients(layer: Layer, y: torch.Tensor, number: int, found: OutputGradients) -> None:
    index = layer.draw(y, number)
    rows = found.rows.setdefault(layer.node, [])

    def keep(gradient: torch.Tensor) -> None:
        rows.append(layer.outputs(gradient, index).square().sum(-1))

    y.register_hook(keep)


def _keep_value_gradients(observer: nn.Module, y: torch.Tensor, moved: Moved, found: OutputGradients) -> None:
    if not is_affine(observer) or getattr(observer, "is_dynamic", False) or not hasattr(observer, "min_val"):
        return
    grid = affine(observer)
    low, high = float(grid.min_val.min().clamp(max=0.0)), float(grid.max_val.max().clamp(min=0.0))
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
