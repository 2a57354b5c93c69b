"""Batch norm with statistics over the batches of all processes."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed.nn.functional import all_reduce
from torch.overrides import TorchFunctionMode

from quantflow.distributed.group import carried
from quantflow.graph.modes import BATCH_NORM


class SynchronizedBatchNorm(TorchFunctionMode):
    """A context in which batch norm in training mode computes its statistics over the batches of all processes.

    The context works on any device and backend (``torch.nn.SyncBatchNorm`` needs a GPU) and does not change the graph.
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
    given, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)  # sums overflow in half precision
    dims = [d for d in range(x.ndim) if d != 1]
    shape = [1, -1, *[1] * (x.ndim - 2)]
    count = torch.tensor([x.numel() / x.shape[1]], dtype=wide, device=x.device)
    # Two reductions: the variance about the common mean is more exact than the difference of squares.
    total = _sum(torch.cat([x.sum(dims), count]))
    average, count = total[:-1] / total[-1], total[-1].detach()
    centred = x - average.reshape(shape)
    variance = _sum(centred.square().sum(dims)) / count
    if running_mean is not None and running_var is not None:
        with torch.no_grad():
            running_mean.lerp_(average.to(running_mean.dtype), momentum)
            running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), momentum)
    y = centred * torch.rsqrt(variance + eps).reshape(shape)
    y = y if weight is None else y * weight.reshape(shape)
    y = y if bias is None else y + bias.reshape(shape)
    return y.to(given)


def _sum(own: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, through which gradients pass."""
    return all_reduce(carried(own)).to(own.device)
