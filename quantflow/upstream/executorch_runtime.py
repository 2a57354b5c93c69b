"""The number of threads of executorch's runtime, and its start without executorch's compiler.

Names: ``executorch.extension.pybindings.portable_lib._threadpool_get_thread_count``; ``executorch.exir`` in ``sys.modules``,
which is replaced by a package without content. A missing count is logged and becomes 0. Without the replacement, the runtime
starts slower.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import types

_log = logging.getLogger("quantflow")


def thread_count() -> int:
    """Return the number of threads that the runtime uses; 0 if it does not tell."""
    from executorch.extension.pybindings import portable_lib

    try:
        return int(portable_lib._threadpool_get_thread_count())
    except AttributeError as error:
        _log.info("the number of threads of the runtime is unknown: %s", error)
        return 0


def leave_out_exir() -> None:
    """Make the runtime start without the import of executorch's compiler, which takes seconds.

    The runtime needs only one warning class of the compiler. This function is for processes that only run programs:
    ``executorch.exir`` can't be used in them afterwards.
    """
    spec = importlib.util.find_spec("executorch.exir")
    if spec is not None and "executorch.exir" not in sys.modules:
        package = types.ModuleType("executorch.exir")
        package.__path__ = list(spec.submodule_search_locations or ())  # submodules are found without its __init__
        sys.modules["executorch.exir"] = package
