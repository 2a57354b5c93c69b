"""The table of the search: the precisions of each layer, with the noise, size and latency of each."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quantflow.distributed import grouped, total, world_size


@dataclass(frozen=True)
class Choice:
    """One layer at one precision; its costs are differences to the baseline program.

    Attributes:
        layer: The name of the layer.
        precision: The name of the precision.
        noise: The noise power that it adds to the outputs, relative to the power of the outputs, measured in simulation.
        size: The change of the size of the ``.pte``, bytes.
        time: The change of the median latency on the runtime, milliseconds.
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
        choices: One or more choices for each layer.
        size: The size of the baseline program, bytes.
        time: The latency of the baseline program, milliseconds.
    """

    choices: tuple[Choice, ...]
    size: int
    time: float

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers, in graph order."""
        return tuple(dict.fromkeys(choice.layer for choice in self.choices))

    def agreed(self) -> Table:
        """The table with noise and times averaged over all processes, so that all of them make the same choice."""
        if not grouped():
            return self
        own = torch.tensor([(c.noise, c.time) for c in self.choices] + [(0.0, self.time)], dtype=torch.float64)
        *means, (_, time) = (total(own) / world_size()).tolist()
        pairs = zip(self.choices, means, strict=True)
        return Table(tuple(replace(c, noise=noise, time=ms) for c, (noise, ms) in pairs), self.size, time)

    def total(self, chosen: tuple[Choice, ...]) -> tuple[float, int, float]:
        """The predicted noise, bytes and milliseconds for one choice per layer."""
        size, time = self.size + sum(c.size for c in chosen), self.time + sum(c.time for c in chosen)
        return sum(c.noise for c in chosen), size, time
