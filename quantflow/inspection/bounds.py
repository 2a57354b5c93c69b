"""Memory bounds for untrusted programs, and a memory limit for the process that runs them."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from quantflow.pte import Method, TensorType

_BASE = 2 * 2**30  # bytes of address space
_A_THREAD = 160 * 2**20  # the stack of a thread and its malloc arena
# Loading packs weights into new memory. The working memory of a delegate is in no memory plan.
_A_FILE_BYTE, _A_TENSOR_BYTE = 16, 64


def memory() -> int:
    """Return the bytes of physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def too_much(method: Method) -> str:
    """Return why ``method`` does not fit into the memory of this machine; ``""`` if it does."""
    if any(size < 0 for sizes in (method.planned_bytes, *(t.shape for t in method.inputs)) for size in sizes):
        return "it holds a negative size"
    there = memory()
    for what, size in (("memory plan asks", sum(method.planned_bytes)), ("inputs ask", tensor_bytes(method.inputs))):
        if size > there:
            return f"its {what} for {size:,} bytes, this machine has {there:,}"
    return ""


def tensor_bytes(tensors: Sequence[TensorType]) -> int:
    """Return the bytes of all ``tensors`` of known dtype, at their largest sizes."""
    import torch

    dtypes = ((t, getattr(torch, t.dtype or "", None)) for t in tensors)
    return sum(math.prod(t.shape) * dtype.itemsize for t, dtype in dtypes if isinstance(dtype, torch.dtype))


def limit_memory(file: int, tensors: int) -> None:
    """Limit the address space of this process to a generous estimate of what a program needs. This works only on Linux.

    Args:
        file: Bytes of the program.
        tensors: Bytes of its memory plan and inputs.
    """
    if not sys.platform.startswith("linux"):
        return
    import resource

    wanted = _BASE + (os.cpu_count() or 1) * _A_THREAD + _A_FILE_BYTE * file + _A_TENSOR_BYTE * tensors
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    most, (_, hard) = mapped + min(wanted, memory()), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
