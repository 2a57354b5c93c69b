"""What is measured of outputs: accuracy, agreement, signal to quantization noise; summed by batch, in bounded memory."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


def squares(reference: torch.Tensor, approximation: torch.Tensor) -> tuple[float, float]:
    """The sums of squares of ``reference`` and of its difference to ``approximation``, float64.

    Equal elements differ by nothing, also where they are NaN or infinite.
    """
    reference, approximation = reference.double(), approximation.double()
    same = (reference == approximation) | (reference.isnan() & approximation.isnan())
    noise = (reference - approximation)[~same].square().sum()
    return float(reference[reference.isfinite()].square().sum()), float(noise)


def decibels(signal: float, noise: float) -> float:
    """The ratio of two sums of squares, dB: infinite without noise, NaN where the noise is."""
    if noise == 0.0:
        return math.inf
    return (
        math.nan if math.isnan(noise) else 10 * (math.log10(signal) if signal else -math.inf) - 10 * math.log10(noise)
    )


def signal_to_noise(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """The signal to quantization noise ratio, dB; infinite for equal tensors."""
    return decibels(*squares(reference, approximation))


def classes(output: torch.Tensor) -> torch.Tensor | None:
    """The class that an output [rows, classes, ...] says, [rows, ...]; None for an output that tells no classes."""
    return output.argmax(1) if output.ndim > 1 and output.shape[1] > 1 else None


def right(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
    """For each example the share of places whose largest output is the target, [rows]; None where the targets are no classes
    of this output.
    """
    said = classes(output)
    if said is None or said.shape != target.shape or target.is_floating_point() or target.dtype == torch.bool:
        return None
    return (said == target).double().flatten(1).mean(1) if said.ndim > 1 else (said == target).double()


@dataclass
class OutputComparison:
    """One output beside a reference, of any shape."""

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
        """The share of classes that both say, 0 to 1; None where there are no classes."""
        return self.agreed / self.rows if self.rows else None

    @property
    def sqnr_db(self) -> float:
        """The signal to quantization noise ratio, dB."""
        return decibels(self.signal, self.noise)


@dataclass
class PairedDrop:
    """By how much accuracy falls from a reference, both on the same examples."""

    rows: int = 0
    reference: float = 0.0
    own: float = 0.0
    squared: float = 0.0

    def add(self, reference: torch.Tensor, own: torch.Tensor) -> None:
        """Count a batch: what of it is :func:`right`, [rows] each."""
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
        """Half the width of the drop's 95 % interval, points.

        It is that of the mean of the differences example by example, most of which are zero.
        """
        if self.rows < 2:
            return None
        mean = (self.reference - self.own) / self.rows
        variance = max(self.squared - self.rows * mean**2, 0.0) / (self.rows - 1)
        return 100 * 1.96 * math.sqrt(variance / self.rows)
