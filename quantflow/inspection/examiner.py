"""The other side of :mod:`quantflow.inspection.quarantine`: a process that reads bytes and writes JSON."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

from quantflow.errors import QuantflowError


def loads(buffer: bytes) -> dict[str, str]:
    """By method of the program ``buffer``, why it does not load, or does not run on zeros; ``""`` for one that does."""
    from quantflow import runtime
    from quantflow.inspection import pte

    contents = pte.read(buffer)
    program = runtime.load_program(buffer)
    found = {}
    for method in contents.methods.values():
        planned, there = sum(method.planned_bytes), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if planned > there:
            found[method.name] = f"its memory plan asks for {planned:,} bytes, this machine has {there:,}"
            continue
        try:
            loaded = runtime.load_method(program, method.name)
            if all(given.dtype is not None for given in method.inputs):
                runtime.execute(loaded, method.name, [_zeros(given) for given in method.inputs])
            found[method.name] = ""
        except QuantflowError as error:
            found[method.name] = error.reason
        except Exception as error:  # inputs that can't be made, names that are no text
            found[method.name] = f"{type(error).__name__}: {error}"
    return found


def environment(_: bytes) -> dict[str, Any]:
    """What the runtime of this environment has: backends, kernels, threads."""
    import executorch.kernels.quantized  # noqa: F401  registers its kernels
    from executorch.runtime import Runtime

    from quantflow.runtime import threads

    registry = Runtime.get()
    return {
        "backends": sorted(registry.backend_registry.registered_backend_names),
        "kernels": sorted(registry.operator_registry.operator_names),
        "threads": threads(),
    }


def _zeros(given: Any) -> Any:
    import torch

    return torch.zeros(given.shape, dtype=getattr(torch, given.dtype))


TASKS: dict[str, Callable[[bytes], Any]] = {"loads": loads, "environment": environment}


def main() -> None:
    """Run one task; what native code prints goes to the error stream."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        said = {"answer": TASKS[sys.argv[1]](sys.stdin.buffer.read())}
    except QuantflowError as error:
        said = {"error": (error.stage, error.reason, error.node, error.remedy)}
    with answer:
        json.dump(said, answer)


if __name__ == "__main__":
    main()
