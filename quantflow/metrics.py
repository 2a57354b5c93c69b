"""Metrics of outputs: accuracy, agreement and signal to quantization noise ratio, accumulated by batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


def squares(reference: torch.Tensor, approximation: torch.Tensor) -> tuple[float, float]:
    """The sums of squares, in float64, of ``reference`` and of its difference to ``approximation``.

    The difference of equal elements is zero, also if both are NaN or infinite.
    """
    reference, approximation = reference.double(), approximation.double()
    same = (reference == approximation) | (reference.isnan() & approximation.isnan())
    noise = (reference - approximation)[~same].square().sum()
    return float(reference[reference.isfinite()].square().sum()), float(noise)


def decibels(signal: float, noise: float) -> float:
    """The ratio of two sums of squares in dB: infinite if ``noise`` is zero, NaN if it is NaN."""
    if noise == 0.0:
        return math.inf
    return (
        math.nan if math.isnan(noise) else 10 * (math.log10(signal) if signal else -math.inf) - 10 * math.log10(noise)
    )


def signal_to_noise(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """The signal to quantization noise ratio, dB; infinite for equal tensors."""
    return decibels(*squares(reference, approximation))


def classes(output: torch.Tensor) -> torch.Tensor | None:
    """The predicted classes [rows, ...] of an output [rows, classes, ...]; None if the output is not of this form."""
    return output.argmax(1) if output.ndim > 1 and output.shape[1] > 1 else None


def right(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """For each example the share of positions whose predicted class is the target, [rows]; None if the targets are not
    classes of this output.
    """
    said = classes(output)
    if said is None or said.shape != target.shape or target.is_floating_point() or target.dtype == torch.bool:
        return None
    return (said == target).double().flatten(1).mean(1) if said.ndim > 1 else (said == target).double()


@dataclass
class OutputComparison:
    """The comparison of one output, of any shape, with a reference."""

    rows: float = 0.0
    agreed: float = 0.0
    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: torch.Tensor, approximation: torch.Tensor) -> None:
        """Count a batch."""
        signal, noise = squares(reference, approximation)
        self.signal, self.noise = self.signal + signal, self.noise + noise
        ours, theirs = classes(approximation), classes(reference)
        if ours is not None and theirs is not None:
            self.rows += ours.numel()
            self.agreed += float((ours == theirs).sum())

    @property
    def agreement(self) -> float | None:
        """The share of equal predicted classes, 0 to 1; None if the output has no classes."""
        return self.agreed / self.rows if self.rows else None

    @property
    def sqnr_db(self) -> float:
        """The signal to quantization noise ratio, dB."""
        return decibels(self.signal, self.noise)


@dataclass
class PairedDrop:
    """The drop of accuracy from a reference on the same examples."""

    rows: int = 0
    reference: float = 0.0
    own: float = 0.0
    squared: float = 0.0

    def add(self, reference: torch.Tensor, own: torch.Tensor) -> None:
        """Add a batch: the results of :func:`right` of both outputs, [rows] each."""
        self.rows += len(own)
        self.reference, self.own = self.reference + float(reference.sum()), self.own + float(own.sum())
        self.squared += float((reference - own).square().sum())

    @property
    def top1(self) -> float | None:
        """The accuracy, 0 to 1."""
        return self.own / self.rows if self.rows else None

    @property
    def points(self) -> float | None:
        """The drop, points."""
        return 100 * (self.reference - self.own) / self.rows if self.rows else None

    @property
    def interval(self) -> float | None:
        """Half the width of the 95 % confidence interval of the drop, points.

        The interval is that of the mean of the paired differences, most of which are zero.
        """
        if self.rows < 2:
            return None
        mean = (self.reference - self.own) / self.rows
        variance = max(self.squared - self.rows * mean**2, 0.0) / (self.rows - 1)
        return 100 * 1.96 * math.sqrt(variance / self.rows)
