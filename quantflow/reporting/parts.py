"""The parts of a report: results of the functions of quantflow."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from quantflow.analysis import Diagnosis, Sensitivities
from quantflow.errors import QuantflowError
from quantflow.evaluation import Verification
from quantflow.inspection.environment import Environment
from quantflow.lowering.program import Program
from quantflow.pipeline.result import Report, Result
from quantflow.reporting.operator_plans import Plan
from quantflow.training import History


@dataclass(frozen=True)
class Parts:
    """The results to report on; None for those that are not available.

    Attributes:
        title: The heading.
        command: The command that produced the results.
        made: The date and time, UTC.
        environment: The versions of packages.
        built: The report of :func:`quantflow.quantize`.
        program: The program.
        plan: The plan of each operator, a ``quantizers.Plan``.
        history: The result of :func:`quantflow.train`.
        verification: The result of :func:`quantflow.verify`.
        diagnosis: The result of :func:`quantflow.diagnose`.
        sensitivities: The result of :func:`quantflow.sensitivity`.
    """

    title: str
    command: str
    made: str
    environment: Environment
    built: Report | None
    program: Program | None
    plan: Plan | None
    history: History | None
    verification: Verification | None
    diagnosis: Diagnosis | None
    sensitivities: Sensitivities | None

    @classmethod
    def of(
        cls, title: str, command: str, made: str, environment: Environment, result: Result | None, **given: Any
    ) -> Parts:
        """``given`` as parts; ``result`` provides the program and the plan if they are missing.

        Raises:
            QuantflowError: at stage ``"report"``, if there is no part, or if one has another type.
        """
        given["built"] = result.report if result is not None else None
        if result is not None:
            given["program"] = given["program"] or result.program
            # The plan of another quantizer may have another type.
            given["plan"] = given["plan"] or (result.report.plan if hasattr(result.report.plan, "operators") else None)
        if all(part is None for part in given.values()):
            remedy = "pass returned results: result=qf.quantize(...), verification=qf.verify(...)"
            raise QuantflowError("report", "there is nothing to report on", remedy=remedy)
        return cls(title, command, made, environment, **given)

    def to_json(self) -> str:
        """The figures of all parts, as a JSON object."""
        found: dict[str, Any] = {"title": self.title, "command": self.command, "made": self.made}
        told = {name: json.loads(part.to_json()) for name, part in self._telling().items() if part is not None}
        if self.program is not None:
            told["program"] = {"bytes": len(self.program.buffer)}
            if self.program.delegation is not None:
                told["program"]["delegation"] = json.loads(self.program.delegation.to_json())
        if self.history is not None:
            told["training"] = asdict(self.history)
        return json.dumps(found | told, indent=2)

    def _telling(self) -> dict[str, Any]:
        return {
            "quantization": self.built,
            "plan": self.plan if self.built is None or self.plan is not self.built.plan else None,
            "verification": self.verification,
            "diagnosis": self.diagnosis,
            "sensitivities": self.sensitivities,
            "environment": self.environment,
        }


def checked(**given: object) -> None:
    """Check the type of each part.

    Raises:
        QuantflowError: at stage ``"report"``, naming the part.
    """
    kinds = {
        "result": (Result, "qf.quantize returned"),
        "program": (Program, "to_executorch() or qf.load returned"),
        "history": (History, "qf.train returned"),
        "verification": (Verification, "qf.verify returned"),
        "diagnosis": (Diagnosis, "qf.diagnose returned"),
        "sensitivities": (Sensitivities, "qf.sensitivity returned"),
    }
    for name, (kind, made) in kinds.items():
        if given[name] is not None and not isinstance(given[name], kind):
            raise QuantflowError(
                "report", f"{type(given[name]).__name__} is none", node=name, remedy=f"pass what {made}"
            )
    if given["plan"] is not None and not hasattr(given["plan"], "operators"):
        reason = f"{type(given['plan']).__name__} is none"
        raise QuantflowError("report", reason, node="plan", remedy="pass what quantizer.plan(graph) returned")
