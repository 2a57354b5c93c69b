"""Execution of tasks on untrusted files in a separate process, whose crash becomes an error."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

from quantflow.errors import QuantflowError

_START = 120.0  # seconds for imports on a busy machine


def in_quarantine(task: str, payload: bytes = b"", *, node: str | None = None, seconds: float = 300.0) -> Any:
    """Run ``task`` of :mod:`quantflow.inspection.examiner` on ``payload`` in a new interpreter and return its result.

    Args:
        task: The name of the task.
        payload: The input of the task.
        node: The file named in errors.
        seconds: The time limit of the task after its start.

    Raises:
        QuantflowError: at stage ``"runtime"``, when the process crashes or exceeds the time limit; the task's own error,
            when the task fails.
    """
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    command = [sys.executable, "-P", "-m", "quantflow.inspection.examiner", task, str(seconds)]
    remedy = "the file is damaged or hostile: do not load it; lower the model again"
    try:
        done = subprocess.run(
            command,
            input=payload,
            capture_output=True,
            timeout=seconds + _START,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise QuantflowError("runtime", f"no end after {seconds:g} s", node=node, remedy=remedy) from error
    if done.returncode == -signal.SIGALRM:
        raise QuantflowError("runtime", f"no end after {seconds:g} s", node=node, remedy=remedy)
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise QuantflowError("runtime", _how_it_ended(done), node=node, remedy=remedy) from None
    if "error" in answer:
        stage, reason, cause, advice = answer["error"]
        raise QuantflowError(stage, reason, node=node or cause, remedy=advice)
    return answer["answer"]


def _how_it_ended(done: subprocess.CompletedProcess[bytes]) -> str:
    last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:]
    said = f" ({last[0][:200]})" if last else ""
    if done.returncode < 0:
        return f"the runtime crashes on it: {signal.Signals(-done.returncode).name}{said}"
    return f"the process that examined it failed with exit code {done.returncode}{said}"
