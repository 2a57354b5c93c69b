"""From a range to a scale and a zero point: the one routine that observers, fake quantize and convert share."""

from __future__ import annotations

import torch

# A scale no smaller than this: what float32 tells apart from zero near one. (A larger floor, 2**-12 in the stock XNNPACK
# quantizer, costs channels with small weights their levels.)
SMALLEST_SCALE = torch.finfo(torch.float32).eps

PER_CHANNEL = frozenset({torch.per_channel_affine, torch.per_channel_symmetric})
SYMMETRIC = frozenset({torch.per_tensor_symmetric, torch.per_channel_symmetric})


def choose_qparams(
    min_val: torch.Tensor,
    max_val: torch.Tensor,
    *,
    quant_min: int,
    quant_max: int,
    symmetric: bool,
    eps: float = SMALLEST_SCALE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point that map a real range onto ``[quant_min, quant_max]``; zero is always exact.

    Args:
        min_val: Lower ends, float32, any shape (one a channel, or a scalar).
        max_val: Upper ends, same shape.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        symmetric: Centre the grid on zero, which is then the zero point of a signed grid.
        eps: Smallest scale.

    Returns:
        ``scale`` (float32) and ``zero_point`` (int32), in the shape of ``min_val``.
    """
    low = min_val.clamp(max=0.0)
    high = max_val.clamp(min=0.0)
    steps = quant_max - quant_min
    if symmetric:
        scale = (torch.maximum(-low, high) / (steps / 2)).clamp(min=eps)
        middle = 0 if quant_min < 0 else (quant_min + quant_max + 1) // 2
        return scale, torch.full_like(scale, middle, dtype=torch.int32)
    scale = ((high - low) / steps).clamp(min=eps)
    zero_point = (quant_min - torch.round(low / scale)).clamp(quant_min, quant_max)
    return scale, zero_point.to(torch.int32)


def reciprocal(scale: torch.Tensor) -> torch.Tensor:
    """``1 / scale``, rounded once: quantizing multiplies by it, in training, in conversion and in the graph."""
    return (1.0 / scale.double()).to(scale.dtype)


def broadcast(qparam: torch.Tensor, ndim: int, axis: int) -> torch.Tensor:
    """``qparam`` if it has one value a channel, shaped to broadcast against a tensor of ``ndim`` dimensions along ``axis``."""
    return qparam if qparam.ndim != 1 else qparam.reshape([-1 if d == axis else 1 for d in range(ndim)])


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int, axis: int = 0
) -> torch.Tensor:
    """The integers nearest to ``x`` on the grid, as float values (ties to even)."""
    inverse, zero_point = broadcast(reciprocal(scale), x.ndim, axis), broadcast(zero_point, x.ndim, axis)
    return (torch.round(x * inverse) + zero_point).clamp(quant_min, quant_max)
