"""A program is decomposed only if something is left to decompose.

Name: ``torch.export.ExportedProgram.run_decompositions``, which is replaced. executorch calls it several times with one table.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch import fx

from quantflow.upstream.replaced import replaced


def decompose_once() -> contextlib.AbstractContextManager:
    """A program from ``run_decompositions`` is functional, so it is returned unchanged if no operator of the table is in it."""
    run = torch.export.ExportedProgram.run_decompositions
    functional: weakref.WeakSet[fx.GraphModule] = weakref.WeakSet()

    def run_decompositions(self: Any, decomp_table: Any = None, decompose_custom_triton_ops: bool = False) -> Any:
        if self.graph_module in functional and decomp_table is not None:
            modules = [m for m in self.graph_module.modules() if isinstance(m, fx.GraphModule)]
            if not any(n.target in decomp_table for m in modules for n in m.graph.nodes if n.op == "call_function"):
                return self
        made = run(self, decomp_table, decompose_custom_triton_ops)
        functional.add(made.graph_module)
        return made

    return replaced(torch.export.ExportedProgram, "run_decompositions", run_decompositions)
