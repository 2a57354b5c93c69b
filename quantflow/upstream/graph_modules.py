"""What a ``torch.fx.GraphModule`` keeps beside its nodes: its code generator and generated code.

Names: ``Graph._codegen`` and its ``pytree_info``, which hold the structure of inputs and outputs; ``_graph``, ``_code``,
``_lineno_map``, ``_prologue_start`` and ``_tracer_cls`` of a ``GraphModule``, which are not pickled. There is no fall-back.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Graph
from torch.fx.graph import CodeGen

# Attributes of a GraphModule that it computes from its graph.
GENERATED = frozenset({"_graph", "_code", "_lineno_map", "_prologue_start", "_tracer_cls"})


def codegen_of(graph: Graph) -> CodeGen:
    """Return the code generator of ``graph``."""
    return graph._codegen


def pytree_info_of(graph: Graph) -> Any:
    """Return the structure of the inputs and outputs of ``graph``, with ``in_spec`` and ``out_spec``; None if it is flat."""
    return getattr(graph._codegen, "pytree_info", None)
