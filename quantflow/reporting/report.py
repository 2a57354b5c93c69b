"""``report``: writes the results of quantization, training and verification as an HTML page and JSON."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from quantflow.analysis import Diagnosis, Sensitivities
from quantflow.errors import QuantflowError
from quantflow.evaluation import Verification
from quantflow.files import write_atomically
from quantflow.inspection.environment import examine
from quantflow.lowering.program import Program
from quantflow.pipeline.result import Result
from quantflow.reporting.operator_plans import Plan
from quantflow.reporting.page import page
from quantflow.reporting.parts import Parts, checked
from quantflow.training import History


def report(
    path: str | os.PathLike[str],
    *,
    title: str = "Quantization report",
    result: Result | None = None,
    program: Program | None = None,
    plan: Plan | None = None,
    history: History | None = None,
    verification: Verification | None = None,
    diagnosis: Diagnosis | None = None,
    sensitivities: Sensitivities | None = None,
    command: str | None = None,
) -> Path:
    """Write ``report.html``, one file that needs no network, and ``report.json`` beside it with the same figures.

    Each part that is given makes a section; at least one is needed. Needs matplotlib.

    Args:
        path: The path of the page, ``.html`` or ``.htm``; the figures go to the same name with ``.json``.
        title: The heading; the name of the model, say.
        result: What :func:`quantflow.quantize` returned; it brings ``program`` and ``plan`` with it.
        program: The program, where there is no ``result``.
        plan: What ``quantizer.plan(graph)`` returned, where there is no ``result``.
        history: What :func:`quantflow.train` returned.
        verification: What :func:`quantflow.verify` returned. The summary compares its last stage with its first.
        diagnosis: What :func:`quantflow.diagnose` returned.
        sensitivities: What :func:`quantflow.sensitivity` returned.
        command: The command line to show; by default that of this process, with absolute paths cut to their last name.

    Returns:
        The path of the page.

    Raises:
        QuantflowError: at stage ``"report"``, when there is nothing to report on, a part is something else, ``path`` is no
            page, matplotlib is missing, or the files can't be written.

    Example:
        >>> import os, tempfile
        >>> import quantflow as qf
        >>> history = qf.History(loss=[1.2, 0.7, 0.5])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = qf.report(os.path.join(folder, "report.html"), title="A small network", history=history)
        ...     print(sorted(os.listdir(folder)))
        ['report.html', 'report.json']
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
    """The command line without the folders of absolute paths."""
    program, *rest = arguments
    return shlex.join([Path(program).name, *(_without_folders(argument) for argument in rest)])


def _without_folders(argument: str) -> str:
    name, equals, value = argument.partition("=")
    if equals and os.path.isabs(value):
        return f"{name}={Path(value).name}"
    return Path(argument).name if os.path.isabs(argument) else argument
