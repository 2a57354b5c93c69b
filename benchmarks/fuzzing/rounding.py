"""The effect of rounding errors on outputs, which distinguishes amplified rounding from wrong results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.fx import GraphModule

Call = tuple[tuple, dict[str, Any]]
Outputs = list[list[torch.Tensor]]  # [call][output]

_QUANTIZE = ("quantize_per_tensor", "quantize_per_channel")
_RELATIVE = 4e-7  # a few units in the last place of float32


def tensors_of(output: Any) -> list[torch.Tensor]:
    """Copies of the tensors of an output."""
    return [t.detach().clone() for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]


def outputs_of(model: Callable[..., Any], calls: Sequence[Call]) -> Outputs:
    """The outputs of ``model`` for consecutive calls. Each call gets copies of its inputs, because it may write to them."""
    found = []
    for args, kwargs in calls:
        own_args, own_kwargs = copy.deepcopy((args, kwargs))
        with torch.no_grad():
            found.append(tensors_of(model(*own_args, **own_kwargs)))
    return found


def moved(model: nn.Module, calls: Sequence[Call], draw: int) -> tuple[nn.Module, list[Call]]:
    """A copy of ``model`` and of the inputs, with weights, buffers and inputs changed by a few units in the last place."""
    generator = torch.Generator().manual_seed(draw)

    def off(t: Any) -> Any:
        if not isinstance(t, torch.Tensor) or not t.is_floating_point():
            return t
        return t + t * (torch.rand(t.shape, generator=generator) * 2 - 1) * _RELATIVE

    near = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in (*near.parameters(), *near.buffers()):
            tensor.copy_(off(tensor))
    return near, [pytree.tree_map(off, call) for call in calls]


def float_noise(model: nn.Module, calls: Sequence[Call], draws: int = 4) -> list[Outputs]:
    """The outputs of ``draws`` :func:`moved` copies of ``model``."""
    return [outputs_of(*moved(model, calls, draw)) for draw in range(draws)]


def one_step_noise(
    converted: GraphModule, calls: Sequence[Call], share: float = 1 / 16, draws: int = 8
) -> list[Outputs]:
    """The outputs of a converted graph in which a share of the integers of each activation is changed by one."""
    found = []
    for draw in range(draws):
        near = copy.deepcopy(converted)
        generator = torch.Generator().manual_seed(draw)

        def move(integers: torch.Tensor, low: int, high: int, generator: torch.Generator = generator) -> torch.Tensor:
            dice = torch.rand(integers.shape, generator=generator)
            steps = (dice < share / 2).int() - (dice > 1 - share / 2).int()
            return (integers.int() + steps).clamp(low, high).to(integers.dtype)

        for node in list(near.graph.nodes):
            if not str(node.target).startswith(tuple(f"quantized_decomposed.{name}" for name in _QUANTIZE)):
                continue
            with near.graph.inserting_after(node):
                new = near.graph.call_function(move, (node, *node.args[-3:-1]))
            node.replace_all_uses_with(new, delete_user_cb=lambda user, new=new: user is not new)
        near.recompile()
        found.append(outputs_of(near, calls))
    return found
