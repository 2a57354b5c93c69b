"""Several processes as one: what they agree on, in torch.distributed's default group.

Alone, each of these does nothing and costs nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_reduce
from torch.overrides import TorchFunctionMode

from quantflow.graph.modes import BATCH_NORM


def world_size() -> int:
    """How many processes work together; 1 alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 alone, and 0 writes the files."""
    return dist.get_rank() if world_size() > 1 else 0


def widest(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least of all processes' ``low`` and the greatest of their ``high``, elementwise, the same bits everywhere."""
    if world_size() == 1:
        return low, high
    ends = torch.stack([-low, high])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    return -ends[0], ends[1]


def mean(value: float) -> float:
    """The mean of a figure over all processes."""
    if world_size() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total) / world_size()


def gathered(tensors: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """Every process's ``tensors`` (CPU), by rank."""
    if world_size() == 1:
        return [tensors]
    everyone: list[Any] = [None] * world_size()
    dist.all_gather_object(everyone, tensors)
    return everyone


class SynchronizedBatchNorm(TorchFunctionMode):
    """While active, batch norm in training mode takes its statistics over the batches of all processes.

    Works on any device and backend (``torch.nn.SyncBatchNorm`` needs a GPU), on the graph as it is.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is BATCH_NORM and args[5]:
            return _batch_norm(*args[:5], *args[6:8])
        return func(*args, **(kwargs or {}))


def _batch_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    momentum: float,
    eps: float,
) -> torch.Tensor:
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    count = torch.tensor([x.numel() / x.shape[1]], dtype=x.dtype, device=x.device)
    # Two rounds, since the variance about the common mean is exact where the difference of squares is not.
    total = all_reduce(torch.cat([x.sum(dims), count]))
    average, count = total[:-1] / total[-1], total[-1].detach()
    centred = x - average.reshape(shape)
    variance = all_reduce(centred.square().sum(dims)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(average, momentum)
            running_var.lerp_(variance * (count / (count - 1)), momentum)
    y = centred * torch.rsqrt(variance + eps).reshape(shape)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)
