"""The code of a graph is generated when it is called or read, not after each edit.

Names: ``torch.fx.GraphModule.recompile``, ``code`` and ``__str__``, which are replaced; ``_graph``, ``_in_spec``,
``_out_spec`` and ``_recompile_submodules`` of a graph module; ``torch.fx.graph._PyTreeCodeGen``. executorch's passes recompile
after each edit and rarely call the graph.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

from torch import fx

from quantflow.upstream.replaced import replaced


@contextlib.contextmanager
def code_when_called() -> Iterator[None]:
    """``GraphModule.recompile`` leaves a stub. The code is generated when it is called or read, or at the end."""
    from torch.fx.graph import _PyTreeCodeGen

    write, code = fx.GraphModule.recompile, inspect.getattr_static(fx.GraphModule, "code")
    pending: weakref.WeakSet[fx.GraphModule] = weakref.WeakSet()

    def written(module: fx.GraphModule) -> Any:
        pending.discard(module)
        return write(module)

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        written(self)
        return type(self).forward(self, *args, **kwargs)

    class Later:
        """A substitute for the ``PythonCode`` that ``recompile`` returns."""

        def __init__(self, module: fx.GraphModule) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(written(self._module), name)

    def recompile(self: fx.GraphModule) -> Any:
        if isinstance(self._graph._codegen, _PyTreeCodeGen):
            self._in_spec = self._graph._codegen.pytree_info.in_spec
            self._out_spec = self._graph._codegen.pytree_info.out_spec
        type(self).forward = forward
        pending.add(self)
        self._recompile_submodules()
        return Later(self)

    def read(self: fx.GraphModule) -> str:
        if self in pending:
            written(self)
        return code.fget(self)

    def describe(self: fx.GraphModule) -> str:
        # executorch formats whole graphs for its debug log
        return f"{type(self).__name__}({len(self.graph.nodes)} nodes)"

    with (
        replaced(fx.GraphModule, "recompile", recompile),
        replaced(fx.GraphModule, "code", property(read)),
        replaced(fx.GraphModule, "__str__", describe),
    ):
        try:
            yield
        finally:
            for module in list(pending):
                write(module)
