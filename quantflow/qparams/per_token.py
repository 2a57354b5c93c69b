"""Dynamic quantization per token, with a scale and zero point for each row of the last dimension at run time."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.fx import Node

from quantflow.graph.aten import INFERENCE_IDENTITIES, LINEARS, op
from quantflow.qparams.qparams import choose_qparams
from quantflow.qparams.rounding import round_to_grid

QUANT_MIN, QUANT_MAX = -128, 127


def is_per_token(observer: nn.Module, readers: Iterable[Node]) -> bool:
    """Whether the tensor that ``observer`` quantizes for ``readers`` gets a range per row at run time.

    Kernels of linear layers with dynamic int8 inputs use a range per row. A quantization spec can't express this; it only
    states that the range of a tensor is dynamic.

    Args:
        observer: An observer or fake quantizer, ours or torchao's, or a quantization spec.
        readers: The nodes that read the quantized tensor.
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
    """Round each row of ``x`` [..., features] to 256 levels over a range that contains its minimum, its maximum and zero.

    The gradient is one, because no element saturates other than by rounding.
    """
    if x.ndim == 1:
        return round_per_token(x[None])[0]
    exact = x.detach()
    low, high = (exact.amin(-1, keepdim=True), exact.amax(-1, keepdim=True)) if x.numel() else (exact, exact)
    grid = choose_qparams(low.float(), high.float(), quant_min=QUANT_MIN, quant_max=QUANT_MAX, symmetric=False)
    rounded = round_to_grid(exact, *grid, QUANT_MIN, QUANT_MAX, 0).to(x.dtype)
    return rounded + (x - exact) if x.requires_grad else rounded
