"""The ExecuTorch runtime, in this process."""

from __future__ import annotations

import functools
from typing import Any

from quantflow.errors import QuantflowError
from quantflow.inspection.pte import check_header


@functools.cache
def _runtime() -> Any:
    # Loading the runtime alone leaves the undelegated quantize and dequantize operators without kernels.
    import executorch.kernels.quantized  # noqa: F401
    from executorch.runtime import Runtime

    return Runtime.get()


def load_program(buffer: bytes) -> Any:
    """An ``executorch.runtime.Program`` of ``buffer``.

    Raises:
        QuantflowError: at stage ``"runtime"``, for bytes that are no whole program.
    """
    check_header(buffer)
    try:
        return _runtime().load_program(buffer)
    except RuntimeError as error:
        raise QuantflowError(
            "runtime",
            f"the program does not load: {error}",
            remedy="the file may be cut short, or made by another version of executorch: lower it again",
        ) from error


def load_method(program: Any, name: str) -> Any:
    """The method ``name`` of ``program``, ready to run."""
    try:
        return program.load_method(name)
    except RuntimeError as error:
        raise QuantflowError(
            "runtime",
            f"the method does not load: {error}",
            node=name,
            remedy="a backend or kernel of the program is missing in this runtime, or its delegate refuses a node; "
            "to_edge(None) tells which",
        ) from error


def execute(method: Any, name: str, inputs: list[Any]) -> list[Any]:
    """Run ``method`` on flat ``inputs``."""
    try:
        return method.execute(inputs)
    except RuntimeError as error:
        raise QuantflowError(
            "runtime", f"execution failed: {error}", node=name, remedy="check the inputs against program.signature"
        ) from error


def threads() -> int:
    """How many threads the runtime computes with."""
    from executorch.extension.pybindings import portable_lib

    return int(portable_lib._threadpool_get_thread_count())
