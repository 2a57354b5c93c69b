"""Rounding to the values that integers represent, with a straight-through gradient.

On a CPU, ATen's fake quantize takes about 7 ns per element forward and 2.5 ns backward. The vectorized operators below, with a
mask applied by selection, take about 3 ns and 0.8 ns. A GPU has one fused kernel, and torch.compile generates one.
"""

from __future__ import annotations

from typing import Any

import torch

from quantflow.qparams.qparams import broadcast, reciprocal


def round_to_grid(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, quant_min: int, quant_max: int, axis: int
) -> torch.Tensor:
    """Round ``x`` to the nearest value of the quantization grid ``(q - zero_point)·scale``, ``quant_min ≤ q ≤ quant_max``.

    The gradient is one inside the grid's range and zero outside. ``scale`` (float32) and ``zero_point`` (int32) are scalars,
    one per channel along dimension ``axis`` of ``x``, or have the rank of ``x`` (two or more). A ``scale`` that requires
    a gradient gets that of LSQ (Esser et al. 2020, arXiv:1902.08153, equation 3), in steps: the rounding error inside the range
    and the end of the range outside.
    """
    learned = scale.requires_grad and torch.is_grad_enabled()
    if x.device.type != "cpu" and scale.ndim <= 1 and not torch.compiler.is_compiling() and not learned:
        limits = (quant_min, quant_max)
        if scale.ndim:
            return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, *limits)
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, *limits)
    step = scale if learned and torch.compiler.is_compiling() else scale.detach()
    low, high = (quant_min - zero_point) * step, (quant_max - zero_point) * step
    grid = tuple(broadcast(t, x.ndim, axis) for t in (low, high, scale, reciprocal(step)))
    if torch.compiler.is_compiling():
        if learned:
            position = torch.clamp(x, grid[0], grid[1]) * grid[3]
            return (position + (torch.round(position.detach()) - position.detach())) * grid[2]
        inside = torch.clamp(x, grid[0], grid[1])
        # Straight-through: the value of the rounded tensor, with the gradient of the clamped tensor.
        return inside + (torch.round(inside.detach() * grid[3]) * grid[2] - inside.detach())
    return _RoundToGrid.apply(x, *grid)


class _RoundToGrid(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *grid: torch.Tensor) -> torch.Tensor:
        numbers: list[Any] = list(grid)
        if grid[0].ndim == 0 and x.device.type == "cpu":  # Python numbers use the vectorized path
            numbers = [t.item() for t in grid]
        low, high, scale, inverse = numbers
        y = x.clamp(low, high)
        inside = y == x if any(ctx.needs_input_grad) else None
        y.mul_(inverse).round_().mul_(scale)
        # The output itself is not saved, because the next operator may write into it.
        error = (y - torch.where(inside, x, 0.0), grid[2]) if inside is not None and ctx.needs_input_grad[3] else ()
        ctx.save_for_backward(inside, *error)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple:
        inside, *learned = ctx.saved_tensors
        to_scale = None
        if learned:
            error, scale = learned
            to_scale = (gradient * error).sum_to_size(scale.shape) / scale
        return torch.where(inside, gradient, 0.0), None, None, to_scale, None
