"""What was done to hold a signal to noise of the outputs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from quantflow.analysis.error_statistics import finite


@dataclass(frozen=True)
class SqnrControl:
    """Whether a signal to noise of the outputs holds, and what was changed for it.

    Attributes:
        min_sqnr: The least signal to noise, dB.
        sqnr: What it is, dB, simulated on held-out examples.
        tried: What was tried, in order, each with its signal to noise; the first is the quantizer as it was given.
        kept: The one of these that was kept.
        dynamic: The linear layers whose activations are quantized dynamically for it.
        floating: The layers that are left in float for it.
        blamed: The layers that cost most, where nothing held.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> x = torch.randn(1, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> result = qf.quantize(model, (x,), [torch.randn(8, 3, 8, 8)], progress=False)
        >>> result.report.sqnr_control.holds, result.report.sqnr_control.kept
        (True, 'as planned')
    """

    min_sqnr: float
    sqnr: float
    tried: tuple[tuple[str, float], ...]
    kept: str
    dynamic: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()
    blamed: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether the signal to noise is as large as asked."""
        return self.sqnr >= self.min_sqnr

    def to_json(self) -> str:
        """Return all figures as a JSON object; a figure that is not finite is null."""
        tried = [{"name": name, "sqnr": finite(sqnr)} for name, sqnr in self.tried]
        return json.dumps({**asdict(self), "holds": self.holds, "sqnr": finite(self.sqnr), "tried": tried}, indent=2)

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "does not hold"
        lines = [
            f"signal to noise of {self.min_sqnr:g} dB {verdict}: {self.sqnr:.1f} dB on held-out examples, {self.kept}"
        ]
        if len(self.tried) > 1:
            lines += [f"  {name}: {sqnr:.1f} dB" for name, sqnr in self.tried]
        lines += [f"  with dynamic activations: {name}" for name in self.dynamic]
        lines += [f"  in float: {name}" for name in self.floating]
        return "\n".join(lines)
