"""Learning from the float model's outputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Distillation:
    """Draws the outputs of the graph towards those of a teacher (Hinton et al. 2015, arXiv:1503.02531).

    The loss becomes ``(1 - weight)·loss(output, target) + weight·T²·KL(teacher/T ‖ output/T)``.

    Attributes:
        teacher: The float model in inference mode, called with the same inputs, without gradients.
        weight: Share of the teacher, 0 to 1.
        temperature: T, by which logits are divided.
        logits: Picks the logits, [batch, classes], out of an output; by default the output itself.
    """

    teacher: Callable[..., Any]
    weight: float = 0.9
    temperature: float = 4.0
    logits: Callable[[Any], torch.Tensor] = lambda output: output

    def loss(self, task_loss: torch.Tensor, output: Any, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """The mixed loss for a batch."""
        with torch.no_grad():
            teacher = self.logits(self.teacher(*args, **kwargs)) / self.temperature
        student = F.log_softmax(self.logits(output) / self.temperature, dim=-1)
        divergence = F.kl_div(student, F.log_softmax(teacher, dim=-1), reduction="batchmean", log_target=True)
        return (1 - self.weight) * task_loss + self.weight * self.temperature**2 * divergence
