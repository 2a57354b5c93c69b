"""The verb that shows what was done to a model, whether it holds and what it won, to someone who was not there."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from quantflow.analysis import Diagnosis, Sensitivities
from quantflow.errors import QuantflowError
from quantflow.evaluation import Verification
from quantflow.files import write_atomically
from quantflow.inspection.environment import examine
from quantflow.lowering.program import Program
from quantflow.pipeline.quantize import Result
from quantflow.reporting.page import page
from quantflow.reporting.parts import Parts, checked
from quantflow.training import History


def report(
    path: str | os.PathLike[str],
    *,
    title: str = "Quantization report",
    result: Result | None = None,
    program: Program | None = None,
    plan: Any = None,
    history: History | None = None,
    verification: Verification | None = None,
    diagnosis: Diagnosis | None = None,
    sensitivities: Sensitivities | None = None,
    command: str | None = None,
) -> Path:
    """Write ``report.html``, one file that needs no network, and ``report.json`` beside it with the same figures.

    Whatever parts there are make a section each; at least one is needed. Needs matplotlib.

    Args:
        path: Of the page, ``.html``; the figures go to the same name with ``.json``.
        title: Its heading; the name of the model, say.
        result: What :func:`quantflow.quantize` returned; it brings ``program`` and ``plan`` with it.
        program: The program, where there is no ``result``.
        plan: What ``quantizer.plan(graph)`` returned, where there is no ``result``.
        history: What :func:`quantflow.train` returned.
        verification: What :func:`quantflow.verify` returned. The summary speaks of its last stage beside its first.
        diagnosis: What :func:`quantflow.diagnose` returned.
        sensitivities: What :func:`quantflow.sensitivity` returned.
        command: What to say made it; by default the command line of this process, of whose absolute paths only the last
            name is told.

    Returns:
        The path of the page.

    Raises:
        QuantflowError: at stage ``"report"``, when there is nothing to report on, a part is something else, matplotlib is
            missing, or the files can't be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise QuantflowError("report", "a report is a page", node=str(path), remedy='name it "report.html"')
    given = {
        "program": program,
        "plan": plan,
        "history": history,
        "verification": verification,
        "diagnosis": diagnosis,
        "sensitivities": sensitivities,
    }
    checked(result=result, **given)
    command = command if command is not None else _command(sys.argv)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = Parts.of(title, command, made, examine(runtime=False), result, **given)
    shown, figures = page(parts), parts.to_json()
    write_atomically(path.with_suffix(".json"), figures.encode(), stage="report")
    return write_atomically(path, shown.encode(), stage="report")


def _command(arguments: Sequence[str]) -> str:
    """The command line, without where things lie on this machine."""
    program, *rest = arguments
    return shlex.join([Path(program).name, *(_without_folders(argument) for argument in rest)])


def _without_folders(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if equals and os.path.isabs(value):
        return f"{name}={Path(value).name}"
    return Path(argument).name if os.path.isabs(argument) else argument
