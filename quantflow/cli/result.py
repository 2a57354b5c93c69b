"""What the commands that write a ``.pte`` have to say of it."""

from __future__ import annotations

import json
from dataclasses import dataclass

from quantflow import Verification


@dataclass(frozen=True)
class Made:
    """A program that was written.

    Attributes:
        output: The file.
        report: What quantization did, layer by layer.
        seconds: How long each stage took.
        delegated_fraction: Share of its operators that delegates run.
        verification: Beside the float model, where there was something to score on.
        chosen_by: On how many other images it was chosen which layers stay in float; None where it was not.
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
            figures += (
                f"\n(of images that had no say in it: the layers in float were chosen on {self.chosen_by} others)"
            )
        return f"{self.report}{figures}\n\nwritten: {self.output}"
