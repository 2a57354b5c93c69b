"""What executorch's passes do to a node, for :mod:`.retraces`: which nodes they change, and which operators they rename.

Names: classes and tables of ``executorch.exir.passes`` and ``executorch.backends.xnnpack._passes``, among them
``LegalizePortableDimOrderPass._target_ops``; ``torch._export.passes.replace_view_ops_with_view_copy_ops_pass``.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx

from quantflow.upstream.fake_tensors import FakeTensor
from quantflow.upstream.operators import OpOverload, schema_of

# The methods that a pass may override to change nodes during a retrace.
HOOKS = (
    *("call_operator", "call_sym", "call_cond", "call_while", "call_map", "call_scan", "call_getitem", "call_delegate"),
    *("call_submodule", "placeholder", "output", "on_attr", "_fx", "inputs", "ExportTracer", "ExportInterpreter"),
    "should_preserve_symbolic_input_metadata",
)


def changes() -> dict[type, Callable[[fx.Node], bool]]:
    """For each pass that overrides ``call_operator``: a predicate that tells whether the pass changes a node."""
    from executorch.backends.xnnpack._passes import ConstPropPass
    from executorch.exir import passes
    from executorch.exir.pass_base import map_args
    from executorch.exir.passes import legalize_portable_dim_order_pass as legalize
    from executorch.exir.passes import memory_format_ops_pass as memory
    from executorch.exir.passes.remove_mixed_type_operators import RemoveMixedTypeOperators

    from quantflow.upstream.edge_operators import EdgeOpOverload

    aten = torch.ops.aten
    mixable = {aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.minimum.default}

    def number_for_tensor(node: fx.Node) -> bool:
        found: list[bool] = []

        def look(given: object, declared: torch.Argument) -> None:
            found.append(isinstance(given, (float, int, bool)) and isinstance(declared.type, torch.TensorType))

        map_args(node.target, look, node.args, dict(node.kwargs))
        return any(found)

    def mixed(node: fx.Node) -> bool:
        if node.target in mixable:
            values = [a.meta.get("val") if isinstance(a, fx.Node) else a for a in node.args]
            dtypes = {v.dtype if isinstance(v, FakeTensor) else None for v in values}
            return None in dtypes or len(dtypes) > 1
        return node.target in {aten.div.Tensor, aten.div.Tensor_mode}

    def symbolic(node: fx.Node) -> bool:
        values = [n.meta.get("val") for n in node.all_input_nodes]
        return any(isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)) for v in values)

    def among(table: Container[object]) -> Callable[[fx.Node], bool]:
        return lambda node: isinstance(node.target, EdgeOpOverload) and node.target in table

    return {
        passes.NormalizeTransposePass: lambda n: n.target == aten.t.default,
        passes.ReplaceBrokenOpsWithFunctionalOpsPass: lambda n: n.target.is_view,
        passes.ScalarToTensorPass: number_for_tensor,
        passes.SymToTensorPass: symbolic,
        RemoveMixedTypeOperators: mixed,
        memory.MemoryFormatOpsPass: among(memory.DimOrderOpsMap),
        memory.DimOrderOpsRevertPass: among(memory.MemoryFormatOpsMap),
        ConstPropPass: lambda n: not n.all_input_nodes,
        legalize.LegalizePortableDimOrderPass: lambda n: n.target in legalize.LegalizePortableDimOrderPass._target_ops,
    }


def renames() -> dict[type, Callable[[Any], Any]]:
    """For each pass that only replaces operators: the function from the old operator to the new one."""
    from executorch.exir.passes.replace_aten_with_edge_pass import OpReplacePass, aten_to_edge, should_lower_to_edge
    from torch._export.passes import replace_view_ops_with_view_copy_ops_pass as views

    def copied(target: object) -> object:
        if not isinstance(target, OpOverload):
            return target
        functional = views._NON_FUNCTIONAL_OPS_TO_FUNCTIONAL_OPS.get(target)
        return functional or views.get_view_copy_of_view_op(schema_of(target)) or target

    return {
        OpReplacePass: lambda target: aten_to_edge(target) if should_lower_to_edge(target) else target,
        views.ReplaceViewOpsWithViewCopyOpsPass: copied,
    }
