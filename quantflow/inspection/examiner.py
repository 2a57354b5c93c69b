"""The other side of :mod:`quantflow.inspection.quarantine`: a process that reads bytes and writes JSON."""

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
    """Of the methods of the program ``buffer``: ``"refused"``, why one does not load, or does not run on zeros; ``"not_run"``,
    why one that loads was not run. After ``seconds`` the process ends.
    """
    from quantflow import pte, runtime
    from quantflow.inspection import bounds

    methods = pte.read(buffer).methods.values()
    refused = {method.name: why for method in methods if (why := bounds.too_much(method))}
    if refused:  # loading a program lays out the memory of all its methods
        return {
            "refused": {m.name: refused.get(m.name, "another method asks for too much") for m in methods},
            "not_run": {},
        }
    asked = sum(sum(m.planned_bytes) + bounds.tensor_bytes(m.inputs) for m in methods)
    runtime.start()
    bounds.limit_memory(len(buffer), asked)
    signal.setitimer(signal.ITIMER_REAL, seconds)  # ends this process, native code and all
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
            refused[method.name] = "it asks for more memory than a program of its size needs"
        except Exception as error:  # names that are no text, for one
            refused[method.name] = f"{type(error).__name__}: {error}"
    return {"refused": refused, "not_run": not_run}


def environment(_: bytes, __: float) -> dict[str, Any]:
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


def _not_made(inputs: Sequence[TensorType]) -> str:
    """Why there are no zeros to run on, ``""`` where there are."""
    import torch

    for place, given in enumerate(inputs):
        if given.dtype is None:
            return f"input {place} is no tensor"
        if not isinstance(getattr(torch, given.dtype, None), torch.dtype):
            return f"input {place} is of an {given.dtype}"
    return ""


def _zeros(given: TensorType) -> Any:
    import torch

    return torch.zeros(given.shape, dtype=getattr(torch, str(given.dtype)))


TASKS: dict[str, Callable[[bytes, float], Any]] = {"loads": loads, "environment": environment}


def main() -> None:
    """Run one task; what native code prints goes to the error stream."""
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
