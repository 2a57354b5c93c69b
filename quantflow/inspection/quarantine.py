"""Work on what can't be trusted, in a process of its own: a crash there is an error here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

from quantflow.errors import QuantflowError


def in_quarantine(task: str, payload: bytes = b"", *, node: str | None = None, seconds: float = 300.0) -> Any:
    """What ``task`` of :mod:`quantflow.inspection.examiner` says of ``payload``, in a new interpreter.

    Args:
        task: The name of the task.
        payload: Its input.
        node: The file to name in errors.
        seconds: How long it may take.

    Raises:
        QuantflowError: at stage ``"runtime"``, when the process crashes or does not end; that of the task, when it fails.
    """
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    command = [sys.executable, "-P", "-m", "quantflow.inspection.examiner", task]
    remedy = "the file is damaged or hostile: do not load it; lower the model again"
    try:
        done = subprocess.run(
            command,
            input=payload,
            capture_output=True,
            timeout=seconds,
            env={**os.environ, "PYTHONPATH": path},
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise QuantflowError("runtime", f"no end after {seconds:.0f} s", node=node, remedy=remedy) from error
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
