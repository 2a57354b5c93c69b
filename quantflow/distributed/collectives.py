"""Reductions over all processes, on a device that the group's backend supports."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from quantflow.distributed.group import carried, grouped


def widest(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the minimum of all processes' ``low`` and the maximum of their ``high``, elementwise and equal in all processes.

    A NaN in any process becomes infinite in the result, because a maximum over processes may ignore NaN.
    """
    if not grouped():
        return low, high
    ends = torch.stack([-low, high])
    ends = _reduced(torch.where(ends.isnan(), float("inf"), ends), dist.ReduceOp.MAX)
    return -ends[0], ends[1]


def total(tensor: torch.Tensor) -> torch.Tensor:
    """Return the elementwise sum of all processes' ``tensor``."""
    return _reduced(tensor.clone(), dist.ReduceOp.SUM) if grouped() else tensor


def gathered(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Return the ``tensors`` of every process, on the CPU, in the order of the ranks."""
    if not grouped():
        return [tensors]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, {name: tensor.cpu() for name, tensor in tensors.items()})
    return everyone


def _reduced(own: torch.Tensor, how: dist.ReduceOp.RedOpType) -> torch.Tensor:
    """``own`` reduced over all processes, on its original device. The reduction may overwrite ``own``."""
    sent = carried(own)
    dist.all_reduce(sent, how)
    return sent.to(own.device)
