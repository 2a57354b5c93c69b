"""The process that :mod:`quantflow.inspection.quarantine` starts. It reads bytes and writes JSON."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from quantflow.errors import QuantflowError

if TYPE_CHECKING:
    from quantflow.pte import TensorType


def loads(buffer: bytes, seconds: float) -> dict[str, dict[str, str]]:
    """Load each method of the program ``buffer`` and run it on zeros. The process ends after ``seconds``.

    Returns:
        ``"refused"``: why a method does not load or run, by name; ``"not_run"``: why a loaded method was not run, by name.
    """
    from quantflow import pte, runtime
    from quantflow.inspection import bounds

    methods = pte.read(buffer).methods.values()
    refused = {method.name: why for method in methods if (why := bounds.too_much(method))}
    if refused:  # loading a program allocates the memory of all its methods
        return {
            "refused": {m.name: refused.get(m.name, "another method needs too much memory") for m in methods},
            "not_run": {},
        }
    asked = sum(sum(m.planned_bytes) + bounds.tensor_bytes(m.inputs) for m in methods)
    runtime.start()
    bounds.limit_memory(len(buffer), asked)
    signal.setitimer(signal.ITIMER_REAL, seconds)  # ends this process, also within native code
    program = runtime.load_program(buffer)
    not_run = {}
    for method in methods:
        try:
            loaded = runtime.load_method(program, method.name, buffer)
            if why := _not_made(method.inputs):
                not_run[method.name] = why
            else:
                runtime.execute(loaded, method.name, [_zeros(given) for given in method.inputs])
        except QuantflowError as error:
            refused[method.name] = error.reason
        except MemoryError:
            refused[method.name] = "the method needs more memory than a program of its size should"
        except Exception as error:  # for example, names that are not valid text
            refused[method.name] = f"{type(error).__name__}: {error}"
    return {"refused": refused, "not_run": not_run}


def environment(_: bytes, __: float) -> dict[str, Any]:
    """Return the backends, kernels and threads of the runtime in this environment."""
    import executorch.kernels.quantized  # noqa: F401  registers its kernels
    from executorch.runtime import Runtime

    from quantflow.runtime import threads

    registry = Runtime.get()
    return {
        "backends": sorted(registry.backend_registry.registered_backend_names),
        "kernels": sorted(registry.operator_registry.operator_names),
        "threads": threads(),
    }


def _not_made(inputs: Sequence[TensorType]) -> str:
    """Why no zero inputs can be created; ``""`` if they can."""
    import torch

    for place, given in enumerate(inputs):
        if given.dtype is None:
            return f"input {place} is no tensor"
        if not isinstance(getattr(torch, given.dtype, None), torch.dtype):
            return f"input {place} has the dtype {given.dtype}"
    return ""


def _zeros(given: TensorType) -> Any:
    import torch

    return torch.zeros(given.shape, dtype=getattr(torch, str(given.dtype)))


TASKS: dict[str, Callable[[bytes, float], Any]] = {"loads": loads, "environment": environment}


def main() -> None:
    """Run one task. Output of native code goes to the standard error stream."""
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from quantflow import runtime

    runtime.leave_out_exir()
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        said = {"answer": TASKS[sys.argv[1]](sys.stdin.buffer.read(), float(sys.argv[2]))}
    except QuantflowError as error:
        said = {"error": (error.stage, error.reason, error.node, error.remedy)}
    with answer:
        json.dump(said, answer)


if __name__ == "__main__":
    main()
