"""What ``quantize`` returns: a program, its graph, and a report of what was done."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from quantflow.analysis import AccuracyControl
from quantflow.analysis.sqnr_control import SqnrControl
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.lowering.program import Program
from quantflow.ptq import RecoveryResult


@dataclass(frozen=True)
class Report:
    """What was done.

    Attributes:
        plan: What the quantizer decided, node by node, where it is one that plans; else None.
        recovered: What recovery tried and kept; None where it was not asked for.
        seconds: How long each stage took, in all.
        pte_bytes: Size of the program.
        delegated_fraction: Share of its operators that delegates run.
        sqnr_control: The signal to noise of the outputs, and what was done to hold it; None where it was not measured.
        accuracy_control: How the accuracy budget was met; None where none was given.
    """

    plan: Any
    recovered: RecoveryResult | None
    seconds: dict[str, float]
    pte_bytes: int
    delegated_fraction: float
    sqnr_control: SqnrControl | None = None
    accuracy_control: AccuracyControl | None = None

    def to_json(self) -> str:
        """All of it, as a JSON object; what there is not, or can't be told in JSON, as null."""
        parts = {
            "plan": self.plan,
            "recovered": self.recovered,
            "sqnr-control": self.sqnr_control,
            "accuracy-control": self.accuracy_control,
        }
        told = {name: json.loads(part.to_json()) if hasattr(part, "to_json") else None for name, part in parts.items()}
        sizes = {"pte_bytes": self.pte_bytes, "delegated_fraction": self.delegated_fraction}
        return json.dumps({**sizes, "seconds": self.seconds, **told}, indent=2)

    def __str__(self) -> str:
        timing = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in self.seconds.items())
        lines = [f"{self.pte_bytes:,} bytes, {self.delegated_fraction:.1%} of operators delegated", timing]
        parts = (self.plan, self.recovered, self.sqnr_control, self.accuracy_control)
        return "\n".join([*(str(part) for part in parts if part is not None), *lines])


@dataclass(frozen=True)
class Result:
    """A quantized program, the graph it was lowered from, and a report of what was done.

    Attributes:
        program: The program, for the shapes of the example inputs.
        graph: The converted graph that the program was lowered from.
        report: The plan, the recovery, the seconds of each stage, the bytes of the program and the delegated fraction.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> x = torch.randn(1, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> result = qf.quantize(model, (x,), [torch.randn(4, 3, 8, 8)], recover=False, progress=False)
        >>> result.report.delegated_fraction
        1.0
    """

    program: Program
    graph: TrainableGraphModule = field(repr=False)
    report: Report = field(repr=False)
