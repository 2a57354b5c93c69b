"""``GridAdam``: Adam whose updates are in steps of the quantization grid; oscillating weights freeze."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_MOMENTUM = 0.02  # of the moving averages of turns and integers


@dataclass(frozen=True)
class GridParameter:
    """A parameter, and the unit in which it is moved.

    Attributes:
        parameter: The parameter.
        unit: Broadcasts against it: the step of each weight's grid, or the size of other parameters.
        rounded: Whether the parameter is rounded to a grid whose step is ``unit``.
    """

    parameter: nn.Parameter
    unit: torch.Tensor
    rounded: bool = False


class GridAdam(torch.optim.Adam):
    """Adam (Kingma and Ba 2015, arXiv:1412.6980) with learning rates in units of each parameter.

    A learning rate of 0.01 moves a quantized weight by at most about a hundredth of the step of its grid, whatever the scale of
    its channel; other parameters move relative to their size. The gradient of a weight near the middle of two integers pushes
    it back and forth. A weight whose integer turns back more often than ``freeze`` of the steps is set to the mean of its
    integers, rounded, and stays (Nagel et al. 2022, Overcoming Oscillations in Quantization-Aware Training, arXiv:2203.11086).

    Args:
        groups: Parameter groups: ``{"params": [GridParameter, ...], "lr": ...}``.
        freeze: The share of steps in which a weight's integer turns back, from which the weight is frozen; 1 for never.
        betas: Of Adam.

    Example:
        >>> import torch
        >>> from quantflow.training.grid_adam import GridAdam, GridParameter
        >>> weight = torch.nn.Parameter(torch.tensor([0.5, 5.0]))
        >>> optimizer = GridAdam([{"params": [GridParameter(weight, torch.tensor([0.1, 1.0]))], "lr": 0.5}])
        >>> weight.sum().backward()
        >>> _ = optimizer.step()
        >>> weight.data
        tensor([0.4500, 4.5000])
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]], *, freeze: float = 1.0, betas: tuple[float, float] = (0.9, 0.99)
    ) -> None:
        self._units = {p.parameter: p for group in groups for p in group["params"]}
        plain = [{**group, "params": [p.parameter for p in group["params"]]} for group in groups]
        super().__init__(plain, lr=0.0, betas=betas)
        self.freeze = freeze

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Move each parameter that has a gradient."""
        before = {p: p.detach().clone() for p in self._units if p.grad is not None}
        for parameter in before:
            parameter.zero_()  # Adam then leaves the update itself, without the rounding of a sum
        loss = super().step(closure)
        for parameter, old in before.items():
            given = self._units[parameter]
            parameter.mul_(given.unit).add_(old)
            if given.rounded and self.freeze < 1.0:
                self._freeze_oscillating(parameter, old, given.unit)
        return loss

    def frozen_share(self) -> float:
        """The share of rounded weights that are frozen."""
        frozen = [self.state[p]["frozen"] for p in self._units if "frozen" in self.state[p]]
        return float(sum(f.sum().double() for f in frozen)) / max(sum(f.numel() for f in frozen), 1)

    def _freeze_oscillating(self, weight: nn.Parameter, old: torch.Tensor, step: torch.Tensor) -> None:
        state = self.state[weight]  # all of the weight's dtype: what an optimizer loads is cast to it
        before, now = torch.round(old / step), torch.round(weight / step)
        if "frozen" not in state:
            state |= {name: torch.zeros_like(weight) for name in ("direction", "turns", "frozen")} | {"mean": before}
        direction = torch.sign(now - before)
        turned = direction * state["direction"] < 0
        state["direction"] = torch.where(direction != 0, direction, state["direction"])
        state["turns"].lerp_(turned.to(weight.dtype), _MOMENTUM)
        state["mean"].lerp_(now, _MOMENTUM)
        freezes = (state["turns"] > self.freeze) & (state["frozen"] == 0)
        rested = torch.where(freezes, torch.round(state["mean"]) * step, old)
        state["frozen"].masked_fill_(freezes, 1.0)
        weight.copy_(torch.where(state["frozen"] == 1, rested, weight))
