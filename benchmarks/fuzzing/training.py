"""Training steps: a graph with fake quantization off compared with the eager model, and steps with it on."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import quantflow as qf
from fuzzing.compare import Compared, compare
from fuzzing.rounding import Call, Outputs, moved, tensors_of
from quantflow.capture.exported import INFERENCE_ONLY
from quantflow.graph.graph_module import TrainableGraphModule

EQUAL_DB = 80.0  # a relative difference of 1e-4
_PARTS = ("outputs", "gradients", "buffers", "draws")


def compare_training(
    model: nn.Module, graph: TrainableGraphModule, calls: Sequence[Call], seed: int
) -> dict[str, Compared]:
    """Compare outputs, gradients, buffers and random states of ``graph`` and the eager ``model`` over two training steps.

    Layers that quantflow reports as captured in inference mode are in that mode in the ``model`` too.
    """
    calls = calls[:2]
    told = [layer.split(" (")[0] for layer in graph.meta.get(INFERENCE_ONLY, ()) if " (" in layer]
    model.train()
    for name in told:
        model.get_submodule(name).eval()
    graph.train()
    # A rewrite may change the shape of a weight; its elements are the same.
    pairs = {name: (like, _found(graph, model, name)) for name, like in _named(model)}
    names = {name: own.shape != like.shape for name, (like, own) in pairs.items() if own is not None}
    expected = _steps(copy.deepcopy(model), model, calls, seed, names)
    found = _steps(graph, model, calls, seed, names)
    noise = functools.cache(
        lambda: [
            _steps(near, model, near_calls, seed, names)
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
    qf.train(graph, data, loss=lambda output, _: _loss(output) / 100, lr=1e-4, progress=False)


def _loss(output: Any) -> torch.Tensor:
    """A scalar that depends on every element of every float output, with different weights."""
    total = torch.zeros((), requires_grad=True)
    for t in pytree.tree_leaves(output):
        if isinstance(t, torch.Tensor) and t.is_floating_point() and t.requires_grad:
            pattern = torch.cos(torch.arange(t.numel(), dtype=t.dtype)).reshape(t.shape)
            total = total + (t * pattern).sum() + 0.1 * t.square().sum()
    return total


def _steps(
    network: nn.Module, model: nn.Module, calls: Sequence[Call], seed: int, names: dict[str, bool]
) -> dict[str, Outputs]:
    """The tensors after each training step, by kind, for the names of the eager ``model``; sorted if the flag is True."""
    found: dict[str, Outputs] = {part: [] for part in _PARTS}
    with torch.random.fork_rng(devices=[]), _DrawsByElement():
        for step, (args, kwargs) in enumerate(copy.deepcopy(list(calls))):
            torch.manual_seed(seed + step)
            network.zero_grad(set_to_none=True)
            output = network(*args, **kwargs)
            found["draws"].append([torch.get_rng_state()])
            _loss(output).backward()
            found["outputs"].append(tensors_of(output))
            gradients: list[torch.Tensor] = []
            buffers: list[torch.Tensor] = []
            for name, in_order in names.items():
                tensor = _found(network, model, name)
                assert tensor is not None
                learned = isinstance(tensor, nn.Parameter)
                now = (torch.zeros_like(tensor) if tensor.grad is None else tensor.grad) if learned else tensor
                now = now.flatten().sort().values if in_order else now
                (gradients if learned else buffers).append(now.detach().clone())
            found["gradients"].append(gradients)
            found["buffers"].append(buffers)
    return found


class _DrawsByElement(TorchDispatchMode):
    """Fill random masks element by element instead of in memory order, so that they do not depend on the memory layout."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is torch.ops.aten.bernoulli_.float and not args[0].is_contiguous():
            mask = func(torch.empty_like(args[0], memory_format=torch.contiguous_format), *args[1:], **kwargs or {})
            return args[0].copy_(mask)
        return func(*args, **kwargs or {})


def _named(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


def _found(network: nn.Module, model: nn.Module, name: str) -> torch.Tensor | None:
    """The tensor ``name``, also under another name that the ``model`` has for it; None if the network does not read it."""
    own = dict((*network.named_parameters(remove_duplicate=False), *network.named_buffers(remove_duplicate=False)))
    every = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensor = dict(every)[name]
    return next((own[other] for other, t in every if t is tensor and other in own), None)
