"""Training steps: a graph with rounding off beside the eager model, and a few steps with rounding on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

import quantflow as qf
from fuzzing.compare import Compared, compare
from fuzzing.rounding import Call, Outputs, moved
from quantflow.graph.graph_module import TrainableGraphModule

EQUAL_DB = 80.0  # a relative difference of 1e-4
_PARTS = ("outputs", "gradients", "buffers", "draws")


def compare_training(model: nn.Module, graph: nn.Module, calls: Sequence[Call], seed: int) -> dict[str, Compared]:
    """Two steps in training mode, forward and backward: outputs, gradients, buffers and random draws of ``graph`` beside those
    of the eager ``model``.
    """
    calls = calls[:2]
    missing = {name for name, _ in _named(model) if _found(graph, model, name) is None}
    expected = _steps(copy.deepcopy(model), model, calls, seed, missing)
    found = _steps(graph, model, calls, seed, missing)
    noise = functools.cache(
        lambda: [
            _steps(near, model, near_calls, seed, missing)
            for near, near_calls in (moved(model, calls, draw) for draw in range(4))
        ]
    )
    laws = {}
    for part in _PARTS:
        draws = functools.partial(lambda part: [steps[part] for steps in noise()], part)
        laws[f"training {part}"] = compare(expected[part], found[part], EQUAL_DB, draws)
    return laws


def train(graph: TrainableGraphModule, calls: Sequence[Call]) -> None:
    """Train a graph prepared for QAT for four short steps."""
    target = torch.zeros(1)
    data: list[Any] = []
    for args, kwargs in [*calls[:2], *calls[:2]]:
        named = {f"x{i}": a for i, a in enumerate(args)} | kwargs
        data.append({**copy.deepcopy(named), "labels": target} if kwargs else (copy.deepcopy(args), target))
    qf.train(graph, data, loss=lambda output, _: _loss(output), lr=1e-4, progress=False)


def _loss(output: Any) -> torch.Tensor:
    """A scalar that depends on every element of every float output, each in its own way."""
    total = torch.zeros((), requires_grad=True)
    for t in pytree.tree_leaves(output):
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.requires_grad:
            pattern = torch.cos(torch.arange(t.numel(), dtype=t.dtype)).reshape(t.shape)
            total = total + (t * pattern).mean() + 0.1 * t.square().mean()
    return total


def _steps(
    network: nn.Module, model: nn.Module, calls: Sequence[Call], seed: int, skip: set[str]
) -> dict[str, Outputs]:
    """What a network leaves after each step, by part; names are those of the eager ``model``."""
    found: dict[str, Outputs] = {part: [] for part in _PARTS}
    network.train()
    names = [(name, like) for name, like in _named(model) if name not in skip]
    with torch.random.fork_rng(devices=[]):
        for step, (args, kwargs) in enumerate(copy.deepcopy(list(calls))):
            torch.manual_seed(seed + step)
            network.zero_grad(set_to_none=True)
            output = network(*args, **kwargs)
            found["draws"].append([torch.get_rng_state()])
            _loss(output).backward()
            leaves = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
            found["outputs"].append([t.detach().clone() for t in leaves])
            own = [(like, _found(network, model, name)) for name, like in names]
            gradients = [t.grad for like, t in own if isinstance(like, nn.Parameter)]  # type: ignore[union-attr]
            likes = [like for like, _ in own if isinstance(like, nn.Parameter)]
            pairs = zip(gradients, likes, strict=True)
            found["gradients"].append([torch.zeros_like(like) if g is None else g.clone() for g, like in pairs])
            buffers = [t for like, t in own if not isinstance(like, nn.Parameter)]
            found["buffers"].append([t.detach().clone() for t in buffers])  # type: ignore[union-attr]
    return found


def _named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _found(network: nn.Module, model: nn.Module, name: str) -> torch.Tensor | None:
    """The tensor of that name, or of another name that the ``model`` has for it; None for one that nothing reads."""
    own = dict((*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)))
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensor = dict(every)[name]
    return next((own[other] for other, t in every if t is tensor and other in own), None)
