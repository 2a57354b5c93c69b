"""Faster decomposition of exported programs, to the same graph: half of the time for small programs.

``ExportedProgram.run_decompositions`` asks the dispatcher for all composite operators once for each of some 40 namespaces. It
also registers some 6,000 kernels, each through a new function whose annotations are evaluated. Both together take half a
second, independent of the size of the program.

Names: ``torch._export.utils._materialize_cpp_cia_ops`` and ``_collect_all_valid_cia_ops_for_namespace``;
``torch._ops.OperatorBase.py_impl``, ``py_kernels`` and ``_dispatch_cache``; ``torch._C.DispatchKey``;
``torch.export.exported_program.autograd_not_implemented``. Without one of them, with other versions or if switched off, torch's
own functions run, and the reason is logged.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch

from quantflow.upstream.replaced import exclusively, replaced
from quantflow.upstream.versions import obstacle

_log = logging.getLogger("quantflow")


@contextlib.contextmanager
def fast_decomposition() -> Iterator[None]:
    """Make ``run_decompositions`` fast within the context. Nothing changes for versions that were not checked."""
    with exclusively(), contextlib.ExitStack() as stack:
        if reason := obstacle() or _enter(stack):
            _log.info("fast decomposition is not used: %s", reason)
        yield


def _enter(stack: contextlib.ExitStack) -> str | None:
    """Replace all functions, or none. Returns the reason for none."""
    try:
        stack.enter_context(_operators_once())
        stack.enter_context(_registered_at_once())
    except (ImportError, AttributeError) as error:
        stack.close()
        return f"a name is missing: {error}"
    return None


@contextlib.contextmanager
def _operators_once() -> Iterator[None]:
    """Cache the list of composite operators, of the dispatcher and of each namespace."""
    import torch._export.utils as utils

    with contextlib.ExitStack() as stack:
        for function in (utils._materialize_cpp_cia_ops, utils._collect_all_valid_cia_ops_for_namespace):
            stack.enter_context(replaced(utils, function.__name__, functools.lru_cache(None)(function)))
        yield


@contextlib.contextmanager
def _registered_at_once() -> Iterator[None]:
    """Write a kernel for a dispatch key directly into the operator's table, and register all others as torch does. The kernel
    for operators without a gradient is created once per operator, not once per key.
    """
    from torch.export import exported_program

    base = torch._ops.OperatorBase
    no_gradient = exported_program.autograd_not_implemented  # type: ignore[attr-defined]  # torch does not export it
    register = base.py_impl

    def py_impl(self: Any, key: Any) -> Callable[[Callable], Callable]:
        kernels = self.py_kernels
        if not isinstance(key, torch._C.DispatchKey) or key is torch._C.DispatchKey.Python or key in kernels:
            return register(self, key)

        def add(kernel):  # type: ignore[no-untyped-def]  # annotations cost more than the rest
            kernels[key] = kernel
            self._dispatch_cache.clear()
            return kernel

        return add

    made_once = functools.lru_cache(None)(no_gradient)
    with replaced(base, "py_impl", py_impl), replaced(exported_program, "autograd_not_implemented", made_once):
        yield
