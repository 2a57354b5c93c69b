"""The computation of scale and zero point from a range, which observers, fake quantize and convert share."""

from __future__ import annotations

import torch

# The smallest scale: the machine epsilon of float32. (With a larger floor, such as 2**-12 in the stock XNNPACK quantizer,
# channels with small weights lose levels.)
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
    """Return the scale and zero point that map a real range onto ``[quant_min, quant_max]``. Zero is always exact.

    Args:
        min_val: Lower ends of the ranges, float32, any shape (one per channel, or a scalar).
        max_val: Upper ends of the ranges, same shape.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        symmetric: Use the zero point 0 for signed integers, or the middle of the range for unsigned integers.
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
    """Return ``1 / scale``, rounded once. Training, conversion and the graph all quantize by multiplying with it."""
    return (1.0 / scale.double()).to(scale.dtype)


def broadcast(qparam: torch.Tensor, ndim: int, axis: int) -> torch.Tensor:
    """Return ``qparam``, reshaped if it has one value per channel to broadcast along ``axis`` of ``ndim`` dimensions."""
    return qparam if qparam.ndim != 1 else qparam.reshape([-1 if d == axis else 1 for d in range(ndim)])


def quantize(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int, axis: int = 0
) -> torch.Tensor:
    """Quantize ``x`` to integers in ``[quant_min, quant_max]``, returned as float values (ties to even)."""
    inverse, zero_point = broadcast(reciprocal(scale), x.ndim, axis), broadcast(zero_point, x.ndim, axis)
    return (torch.round(x * inverse) + zero_point).clamp(quant_min, quant_max)
