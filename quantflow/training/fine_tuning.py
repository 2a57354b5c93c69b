"""Fine-tuning of a trained network: the optimizer, its schedule and the teacher that ``train`` takes by default."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from quantflow.graph.aten import node_argument
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.graph.parameters import is_constant, tensor_of
from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.qparams.qparams import broadcast
from quantflow.simulation.float_network import float_network
from quantflow.training.distillation import Distillation
from quantflow.training.grid_adam import GridAdam, GridParameter

# How far a parameter is moved at most, the sum of the learning rates of all steps. Chosen by a few runs, not by a benchmark.
_STEPS = 2.0  # of the grid, for quantized weights
_MEAN_RATE = 0.01  # of the grid a step, at most: integers that change faster do not settle
_SIZES = 0.03  # of its own size, for any other parameter
_WARM_UP = 0.05  # of all steps
_FREEZE = 0.1  # turns a step
_UNKNOWN = 1000  # steps, where the data have no length


def teacher_of(graph: TrainableGraphModule, *, alone: bool) -> Distillation:
    """The float network of ``graph`` as its teacher, alone or beside a person's own loss."""
    return Distillation(float_network(graph), weight=1.0 if alone else 0.9, divergence="mse")


def fine_tuning(graph: TrainableGraphModule, steps: int | None) -> tuple[GridAdam, LambdaLR]:
    """The optimizer and the scheduler of a fine-tuning.

    Learning rates follow from the grid and the number of steps: over a whole training a quantized weight moves by two steps of
    its grid at most, whatever the bits and the scale (by less in fewer than 200 steps), and any other parameter by a few
    percent of its size. They rise over the first steps, and fall along a cosine to zero.

    Args:
        graph: A prepared graph in the form for training, with ranges.
        steps: The number of steps; None if it is not known.
    """
    rounded = _rounded(graph)
    others = [GridParameter(p, _size(p)) for p in graph.parameters() if p.requires_grad and p not in rounded]
    length = steps or _UNKNOWN
    total = sum(_factor(k, length) for k in range(length))
    groups = [
        {"params": list(rounded.values()), "lr": min(_STEPS, _MEAN_RATE * length) / total},
        {"params": others, "lr": _SIZES / total},
    ]
    optimizer = GridAdam([group for group in groups if group["params"]], freeze=_FREEZE)
    return optimizer, LambdaLR(optimizer, lambda k: _factor(k, steps) if steps else 1.0)


def _rounded(graph: TrainableGraphModule) -> dict[nn.Parameter, GridParameter]:
    """The parameters that are rounded to a static grid."""
    found = {}
    for node in graph.graph.nodes:
        called = graph.get_submodule(str(node.target)) if node.op == "call_module" else None
        if not isinstance(called, FakeQuantize) or called.is_dynamic or not is_constant(node.args[0]):
            continue
        weight = tensor_of(graph, node_argument(node))
        if isinstance(weight, nn.Parameter) and weight.requires_grad:
            step = broadcast(called.calculate_qparams()[0].detach(), weight.ndim, called.ch_axis)
            found[weight] = GridParameter(weight, step, rounded=True)
    return found


def _size(parameter: nn.Parameter) -> torch.Tensor:
    """The root mean square of the values of ``parameter``; one where it is zero."""
    size = parameter.detach().square().mean().sqrt()
    return torch.where(size > 0, size, torch.ones_like(size))


def _factor(step: int, steps: int) -> float:
    """Of the learning rate at ``step``: a linear warm-up, and a cosine to zero."""
    return min(1.0, (step + 1) / (_WARM_UP * steps + 1)) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2
