"""The result of commands that write a ``.pte``."""

from __future__ import annotations

import json
from dataclasses import dataclass

from quantflow import Verification


@dataclass(frozen=True)
class Made:
    """A program that was written.

    Attributes:
        output: The path of the file.
        report: The report of quantization, by layer.
        seconds: The time of each stage.
        delegated_fraction: The share of operators that delegates run.
        verification: The comparison with the float model, if there were images to score on.
        chosen_by: The number of other images by which the layers in float were chosen; None if none were.
    """

    output: str
    report: str
    seconds: dict[str, float]
    delegated_fraction: float
    verification: Verification | None
    chosen_by: int | None = None

    def to_json(self) -> str:
        """All but the report, as a JSON object."""
        shown = {"output": self.output, "delegated_fraction": self.delegated_fraction, "seconds": self.seconds}
        figures = None if self.verification is None else json.loads(self.verification.to_json())
        return json.dumps({**shown, "verification": figures, "chosen_by": self.chosen_by}, indent=2)

    def __str__(self) -> str:
        figures = "" if self.verification is None else f"\n\n{self.verification}"
        if self.verification is not None and self.chosen_by is not None:
            figures += f"\n(scored on other images: the layers in float were chosen by {self.chosen_by} images)"
        return f"{self.report}{figures}\n\nwritten: {self.output}"
