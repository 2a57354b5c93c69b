"""Dynamic quantization per token: each row of the last dimension on a grid of its own, chosen at run time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.fx import Node

from quantflow.graph.aten import INFERENCE_IDENTITIES, LINEARS, op
from quantflow.qparams.qparams import choose_qparams
from quantflow.qparams.rounding import round_to_grid

QUANT_MIN, QUANT_MAX = -128, 127


def is_per_token(observer: Any, readers: Iterable[Node]) -> bool:
    """Whether what ``observer`` quantizes for ``readers`` gets a range for each row at run time.

    Kernels of linear layers on dynamic int8 take one, though a quantization spec can say no more than that the range of a
    tensor is dynamic.

    Args:
        observer: An observer or fake quantizer, ours or torchao's, or a quantization spec.
        readers: The nodes that read what it quantizes.
    """
    limits = (getattr(observer, "quant_min", None), getattr(observer, "quant_max", None))
    affine = getattr(observer, "qscheme", None) is torch.per_tensor_affine and limits == (QUANT_MIN, QUANT_MAX)
    dynamic = bool(getattr(observer, "is_dynamic", False)) and observer.dtype in (torch.int8, torch.qint8)
    return affine and dynamic and all(_is_linear(reader) for reader in readers)


def _is_linear(reader: Node) -> bool:
    if op(reader) in INFERENCE_IDENTITIES:
        return all(_is_linear(user) for user in reader.users)
    return op(reader) in LINEARS


def round_per_token(x: torch.Tensor) -> torch.Tensor:
    """``x`` [..., features] with each row rounded to 256 levels between its extremes and zero.

    The gradient is one: no element saturates but by rounding.
    """
    if x.ndim == 1:
        return round_per_token(x[None])[0]
    exact = x.detach()
    low, high = (exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)) if x.numel() else (exact, exact)
    grid = choose_qparams(low.float(), high.float(), quant_min=QUANT_MIN, quant_max=QUANT_MAX, symmetric=False)
    rounded = round_to_grid(exact, *grid, QUANT_MIN, QUANT_MAX, 0).to(x.dtype)
    return rounded + (x - exact) if x.requires_grad else rounded
