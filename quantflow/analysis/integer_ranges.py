"""Quantization parameters of a converted graph's activations, and the least error at as many levels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument
from quantflow.graph.parameters import is_constant, tensor_of
from quantflow.qparams.per_token import round_per_token
from quantflow.qparams.qparams import choose_qparams
from quantflow.qparams.rounding import round_to_grid
from quantflow.upstream.operators import packet_name


@dataclass(frozen=True)
class Grid:
    """The quantization parameters of an activation.

    Attributes:
        scale: Step; None where it is chosen at run time, or for each channel.
        zero_point: The integer that stands for zero.
        quant_min: Smallest integer.
        quant_max: Largest integer.
        per_token: Whether each row has quantization parameters of its own, chosen at run time.
    """

    scale: float | None
    zero_point: int
    quant_min: int
    quant_max: int
    per_token: bool = False

    @classmethod
    def of(cls, dequantize: Node, module: GraphModule) -> Grid:
        """The quantization parameters of the ``dequantize`` node."""
        name = packet_name(dequantize.target)
        if not name.startswith("dequantize_per_tensor"):
            quant_min, quant_max = _limits(dequantize) if name == "dequantize_per_channel" else (-128, 127)
            return cls(None, 0, quant_min, quant_max, name == "dequantize_per_token")
        scale, zero_point = (
            tensor_of(module, q).item() if is_constant(q) else None if isinstance(q, Node) else cast(float, q)
            for q in dequantize.args[1:3]
        )
        quant_min, quant_max = _limits(dequantize)
        return cls(None if scale is None else float(scale), int(zero_point or 0), quant_min, quant_max)

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest representable number."""
        scale = self.scale or 0.0
        return (self.quant_min - self.zero_point) * scale, (self.quant_max - self.zero_point) * scale

    def laid_over(self, x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """``x`` rounded to as many levels between ``low`` and ``high``; per token, between the extremes of each row."""
        if self.per_token:
            return round_per_token(x)
        limits = {"quant_min": self.quant_min, "quant_max": self.quant_max}
        scale, zero_point = choose_qparams(low, high, symmetric=self.quant_min == -self.quant_max, **limits)
        return round_to_grid(x, scale, zero_point, self.quant_min, self.quant_max, 0)


def rounded_constant(dequantize: Node, integers: torch.Tensor, exact: torch.Tensor) -> torch.Tensor | None:
    """``exact`` rounded with the levels and the granularity of ``dequantize``, over the extremes of each part.

    None where the shapes differ, or the operator is not known.
    """
    name = packet_name(dequantize.target)
    if integers.shape != exact.shape:
        return None
    if name.startswith("dequantize_per_channel_group"):
        rows = exact.reshape(-1, int(argument(dequantize, "group_size")))
    elif name.startswith("dequantize_per_channel"):
        rows = exact.movedim(int(argument(dequantize, "axis")), 0).flatten(1)
    elif name.startswith("dequantize_per_tensor"):
        rows = exact.reshape(1, -1)
    else:
        return None
    quant_min, quant_max = _limits(dequantize)
    scale, zero_point = choose_qparams(
        rows.amin(1), rows.amax(1), quant_min=quant_min, quant_max=quant_max, symmetric=quant_min < 0
    )
    rows = round_to_grid(rows, scale, zero_point, quant_min, quant_max, 0)
    if name == "dequantize_per_channel":
        axis = int(argument(dequantize, "axis"))
        moved = exact.movedim(axis, 0)
        return rows.reshape(moved.shape).movedim(0, axis)
    return rows.reshape(exact.shape)


def _limits(dequantize: Node) -> tuple[int, int]:
    return int(argument(dequantize, "quant_min")), int(argument(dequantize, "quant_max"))
