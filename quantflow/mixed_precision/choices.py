"""What each layer may become, and what each choice costs: the table that the search solves."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quantflow.distributed import grouped, total, world_size


@dataclass(frozen=True)
class Choice:
    """One layer at one precision, with the others as in the program that differences are taken from.

    Attributes:
        layer: The name of the layer.
        precision: The name of the precision.
        noise: The noise that it brings to the outputs, in units of their power, measured in simulation.
        size: By how many bytes it changes the ``.pte``.
        time: By how many milliseconds it changes the median of a call on the runtime.
    """

    layer: str
    precision: str
    noise: float
    size: int
    time: float


@dataclass(frozen=True)
class Table:
    """All choices.

    Attributes:
        choices: One or more for each layer.
        size: The bytes of the program that differences are taken from.
        time: The milliseconds of a call of it.
    """

    choices: tuple[Choice, ...]
    size: int
    time: float

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers, in graph order."""
        return tuple(dict.fromkeys(choice.layer for choice in self.choices))

    def agreed(self) -> Table:
        """The table with the mean of all processes' times, and of their noise: each makes the same choice by it."""
        if not grouped():
            return self
        own = torch.tensor([(c.noise, c.time) for c in self.choices] + [(0.0, self.time)], dtype=torch.float64)
        *means, (_, time) = (total(own) / world_size()).tolist()
        pairs = zip(self.choices, means, strict=True)
        return Table(tuple(replace(c, noise=noise, time=ms) for c, (noise, ms) in pairs), self.size, time)

    def total(self, chosen: tuple[Choice, ...]) -> tuple[float, int, float]:
        """The noise, the bytes and the milliseconds that the table predicts for one choice a layer."""
        size, time = self.size + sum(c.size for c in chosen), self.time + sum(c.time for c in chosen)
        return sum(c.noise for c in chosen), size, time
