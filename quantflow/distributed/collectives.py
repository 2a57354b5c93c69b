"""What all processes compute together: each tensor goes to a device that the group's backend takes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from quantflow.distributed.group import carried, grouped


def widest(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least of all processes' ``low`` and the greatest of their ``high``, elementwise, the same bits everywhere.

    What is no number in one of them is infinite in the result: a maximum over processes may forget it.
    """
    if not grouped():
        return low, high
    ends = torch.stack([-low, high])
    ends = _reduced(torch.where(ends.isnan(), float("inf"), ends), dist.ReduceOp.MAX)
    return -ends[0], ends[1]


def total(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' ``tensor``, elementwise."""
    return _reduced(tensor.clone(), dist.ReduceOp.SUM) if grouped() else tensor


def gathered(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Every process's ``tensors``, on the CPU, by rank."""
    if not grouped():
        return [tensors]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: tensor.cpu() for name, tensor in tensors.items()})
    return everyone


def _reduced(own: torch.Tensor, how: Any) -> torch.Tensor:
    """``own``, which nothing else holds, reduced over all processes and back on its device."""
    sent = carried(own)
    dist.all_reduce(sent, how)
    return sent.to(own.device)
