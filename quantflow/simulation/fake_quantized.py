"""A tensor as an observer's quantization parameters round it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.fx import Node

from quantflow.observers import PerGroupMinMaxObserver
from quantflow.observers.observation import affine, qparams_of, qparams_of_range
from quantflow.qparams.per_token import is_per_token, round_per_token
from quantflow.qparams.qparams import PER_CHANNEL
from quantflow.qparams.rounding import round_to_grid


def is_affine(observer: nn.Module) -> bool:
    """Whether ``observer`` quantizes to integers with a scale and a zero point, by torchao's older protocol (``qscheme``)."""
    dtype = getattr(observer, "dtype", torch.float32)
    return hasattr(observer, "qscheme") and hasattr(observer, "quant_min") and not dtype.is_floating_point


def fake_quantized(observer: nn.Module, x: torch.Tensor, readers: Iterable[Node] = ()) -> torch.Tensor:
    """``x`` quantized and dequantized as ``observer`` will.

    Args:
        observer: The observer, calibrated unless it is dynamic.
        x: The tensor that it observes.
        readers: The nodes that read it. They decide whether a dynamic observer has one range for each row.
    """
    grid = affine(observer)
    if getattr(observer, "is_dynamic", False):
        if is_per_token(observer, readers):
            return round_per_token(x)
        scale, zero_point = qparams_of_range(grid, x.detach().min(), x.detach().max())
    elif not is_affine(observer):
        return x
    else:
        scale, zero_point = qparams_of(observer)
    rows, axis = x, 0
    if isinstance(observer, PerGroupMinMaxObserver):  # each group of a weight is a row with a scale of its own
        rows, scale, zero_point = x.reshape(-1, observer.group), scale.reshape(-1), zero_point.reshape(-1)
    elif grid.qscheme in PER_CHANNEL:
        axis = int(grid.ch_axis)
    else:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    limits = grid.quant_min, grid.quant_max
    return round_to_grid(rows, scale.to(x.device), zero_point.to(x.device), *limits, axis).reshape(x.shape)
