"""The rounding noise of a layer as a function of the scale of its input channels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from quantflow.ptq.weight_reconstruction.gptq import damped

_VARIANCE = 1 / 12  # of a rounding error, in squared steps
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class ChannelStatistics:
    """What is known of an activation's channels, float64.

    Attributes:
        low: The least value of each, [channels].
        high: The greatest value of each, [channels].
        sums: Of the drawn values, [channels].
        products: Sums of products of the drawn values of two channels, [channels, channels].
        count: The number of values that were drawn of each.
    """

    low: torch.Tensor
    high: torch.Tensor
    sums: torch.Tensor
    products: torch.Tensor
    count: int

    @classmethod
    def of(cls, x: torch.Tensor, axis: int, rows: int) -> ChannelStatistics:
        """The statistics of ``x`` with its channels in dimension ``axis``; ``rows`` of all rows are drawn for the products."""
        within = x.flatten(axis + 1) if x.ndim > axis + 1 else x.unsqueeze(-1)
        low, high = within.amin(-1), within.amax(-1)  # first over what lies together in memory
        low, high = low.reshape(-1, x.shape[axis]).amin(0).double(), high.reshape(-1, x.shape[axis]).amax(0).double()
        by_row = x.movedim(axis, -1)
        drawn = torch.arange(by_row.shape[:-1].numel())
        if rows < len(drawn):
            drawn = torch.randint(len(drawn), (rows,), generator=torch.Generator().manual_seed(0))
        x = by_row[torch.unravel_index(drawn.to(x.device), by_row.shape[:-1])].double()
        return cls(low, high, x.sum(0), x.T @ x, len(x))

    def __add__(self, other: ChannelStatistics) -> ChannelStatistics:
        low, high = torch.minimum(self.low, other.low), torch.maximum(self.high, other.high)
        sums, products = self.sums + other.sums, self.products + other.products
        return ChannelStatistics(low, high, sums, products, self.count + other.count)

    @property
    def power(self) -> torch.Tensor:
        """The mean square of each channel."""
        return self.products.diagonal() / self.count

    def conditional_variance(self, groups: int) -> torch.Tensor:
        """The variance of each channel given those before it in its group, [groups, channels a group].

        These are the weights of the rounding errors that GPTQ leaves: it compensates for what other channels tell.
        """
        mean = self.sums / self.count
        covariance = self.products / self.count - torch.outer(mean, mean)
        size = len(covariance) // groups
        blocks = torch.stack([covariance[i : i + size, i : i + size] for i in range(0, len(covariance), size)])
        return torch.linalg.cholesky_ex(damped(blocks)).L.diagonal(dim1=1, dim2=2).square()

    def within(self, low: float, high: float) -> ChannelStatistics:
        """The statistics with extremes that are clipped to ``low`` and ``high``."""
        return replace(self, low=self.low.clamp(low, high), high=self.high.clamp(low, high))

    def range(self, divisor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The range of all channels, zero in it, where they are divided by ``divisor``, float64 [channels]."""
        return (self.low / divisor).amin().clamp(max=0), (self.high / divisor).amax().clamp(min=0)

    @property
    def largest(self) -> torch.Tensor:
        """The largest absolute value."""
        return torch.maximum(-self.low, self.high)


@dataclass(frozen=True)
class ActivationNoise:
    """The rounding of an activation whose channels share a step.

    Attributes:
        channels: Of the activation.
        levels: The number of steps of its range.
    """

    channels: ChannelStatistics
    levels: int

    def __call__(self, divisor: torch.Tensor) -> torch.Tensor:
        """Return the variance of an error where the channels are divided by ``divisor``, float64 [channels]."""
        low, high = self.channels.range(divisor)
        return _VARIANCE * ((high - low) / self.levels).square()


@dataclass(frozen=True)
class RoundingNoise:
    """The noise that the rounding of a layer's weight and of its input adds to its output, over the output's power.

    Errors count as independent, and each as uniform over a step; weights as rounded by GPTQ, channel by channel.

    Attributes:
        weight: [groups, outputs a group, channels a group, kernel], float64.
        channels: Of the layer's input.
        variance: Of each channel of the input given those before it, [groups, channels a group], float64.
        levels: The number of steps of the weight's range; None if it is not quantized.
        per_channel: Whether each output of the weight has a step of its own.
        activations: The activations with the channels of the input that are rounded on the way to it.
    """

    weight: torch.Tensor
    channels: ChannelStatistics
    variance: torch.Tensor
    levels: int | None
    per_channel: bool
    activations: tuple[ActivationNoise, ...]

    def relative_weights(self) -> torch.Tensor:
        """The largest absolute weight of each channel, relative to the largest with the same step, float64 [channels]."""
        largest = self.weight.abs().amax(3)
        if self.levels is None:
            return torch.ones_like(self.channels.low)
        of_step = largest.amax(2, keepdim=True) if self.per_channel else largest.amax()
        return (largest / of_step.clamp(min=_TINY)).amax(1).flatten()

    def __call__(self, divisor: torch.Tensor) -> float:
        """Return the noise where the input's channels are divided by ``divisor``, float64 [channels], and the weight's columns
        are multiplied by it.
        """
        columns = self.weight * divisor.reshape(len(self.weight), 1, -1, 1)
        power, spread = (
            (of_channel.flatten() / divisor.square()).reshape(self.variance.shape)
            for of_channel in (self.channels.power, self.variance)
        )
        squares = columns.square().sum(3)
        noise = squares.sum() * sum(activation(divisor) for activation in self.activations)
        if self.levels is not None:
            extremes = columns.abs().amax((2, 3)) if self.per_channel else columns.abs().amax()
            variance = _VARIANCE * (2 * extremes / self.levels).square().expand(columns.shape[:2])
            noise = noise + (variance.sum(1) * spread.sum(1)).sum() * columns.shape[3]
        return float(noise / (squares * power[:, None]).sum().clamp(min=_TINY))
