"""The ExecuTorch runtime, in this process."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from quantflow.errors import QuantflowError
from quantflow.pte import check_header, read
from quantflow.upstream.executorch_runtime import thread_count


@functools.cache
def start() -> Any:
    """Return the runtime, with all of its kernels."""
    # The runtime alone has no kernels for quantize and dequantize operators outside a delegate.
    import executorch.kernels.quantized  # noqa: F401
    from executorch.runtime import Runtime

    return Runtime.get()


def load_program(buffer: bytes) -> Any:
    """Return an ``executorch.runtime.Program`` of ``buffer``.

    Raises:
        QuantflowError: at stage ``"runtime"``, for bytes that are not a complete program.
    """
    check_header(buffer)
    try:
        return start().load_program(buffer)
    except RuntimeError as error:
        raise QuantflowError(
            "runtime",
            f"the program does not load: {error}",
            remedy="the file may be cut short, or made by another version of executorch: lower it again",
        ) from error


def load_method(program: Any, name: str, buffer: bytes) -> Any:
    """Return the method ``name`` of ``program``, which was read from ``buffer``, ready to run.

    Raises:
        QuantflowError: at stage ``"runtime"``, naming the operators whose kernels this runtime lacks, if those are the cause.
    """
    try:
        return program.load_method(name)
    except RuntimeError as error:
        if lacking := missing_kernels(buffer, name):
            reason = f"the method {name} does not load: this runtime has no kernels for these operators"
            remedy = "rewrite the layers in terms of other operators, or link a runtime that has these kernels"
            raise QuantflowError("runtime", reason, node=", ".join(lacking), remedy=remedy) from error
        reason = f"the method does not load: {error}"
        remedy = "a delegate refuses it or is missing in this runtime; what the runtime logged says which node"
        raise QuantflowError("runtime", reason, node=name, remedy=remedy) from error


def missing_kernels(buffer: bytes, name: str) -> list[str]:
    """Return the operators that the method ``name`` of the program ``buffer`` calls without a kernel in this runtime."""
    there = start().operator_registry.operator_names
    called = read(buffer).methods.get(name)
    return [] if called is None else sorted(kernel for kernel in called.kernels if kernel not in there)


def execute(method: Any, name: str, inputs: Sequence[object]) -> list[Any]:
    """Run ``method`` on flat ``inputs``."""
    try:
        return method.execute(inputs)
    except RuntimeError as error:
        raise QuantflowError(
            "runtime",
            f"execution failed: {error}",
            node=name,
            remedy="check the inputs against program.signature; what the runtime logged names the operator",
        ) from error


def threads() -> int:
    """Return the number of threads that the runtime uses; 0 if it does not tell."""
    return thread_count()
