"""Graph copies in place of the retraces by executorch's passes that change nothing.

The module is a part of :mod:`quantflow.delegates.fast_lowering`, which states the conditions.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

from quantflow.upstream.replaced import replaced


class _Memory:
    """A cache of operator results, keyed by the operator and the identity of its input tensors and numbers."""

    _UNSURE = frozenset(
        {torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}
    )
    _PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))

    def __init__(self) -> None:
        self._found: dict[Any, tuple[Any, list[FakeTensor]]] = {}

    def run(self, target: Any, args: Any, kwargs: Any, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``, or its cached result."""
        overload = getattr(target, "_op", target)  # below an edge operator
        if not isinstance(overload, torch._ops.OpOverload) or overload._schema.is_mutable:
            return compute()
        held: list[FakeTensor] = []
        key = self._key((args, sorted(kwargs.items())), held)
        if key is None or not self._UNSURE.isdisjoint(overload.tags):
            return compute()
        if (overload, key) in self._found:
            return self._found[overload, key][0]
        result = compute()
        if all(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(result)):
            self._found[overload, key] = result, held  # references keep the ids of the inputs unique
        return result

    def _key(self, given: Any, held: list[FakeTensor]) -> Any:
        if isinstance(given, FakeTensor) and given.constant is None:
            held.append(given)
            return FakeTensor, id(given)
        if isinstance(given, (list, tuple)):
            keys = tuple(self._key(g, held) for g in given)
            return None if None in keys else (type(given), keys)
        return (type(given), repr(given)) if isinstance(given, self._PLAIN) else None


# The methods that a pass may override to change nodes during a retrace.
_HOOKS = (
    *("call_operator", "call_sym", "call_cond", "call_while", "call_map", "call_scan", "call_getitem", "call_delegate"),
    *("call_submodule", "placeholder", "output", "on_attr", "_fx", "inputs", "ExportTracer", "ExportInterpreter"),
    "should_preserve_symbolic_input_metadata",
)


def _changes() -> dict[type, Callable[[fx.Node], bool]]:
    """For each pass that overrides ``call_operator``: a predicate that tells whether the pass changes a node."""
    from executorch.backends.xnnpack._passes import ConstPropPass
    from executorch.exir import passes
    from executorch.exir.dialects.edge._ops import EdgeOpOverload
    from executorch.exir.pass_base import map_args
    from executorch.exir.passes import legalize_portable_dim_order_pass as legalize
    from executorch.exir.passes import memory_format_ops_pass as memory
    from executorch.exir.passes.remove_mixed_type_operators import RemoveMixedTypeOperators

    aten = torch.ops.aten
    mixable = {aten.add.Tensor, aten.mul.Tensor, aten.sub.Tensor, aten.minimum.default}

    def number_for_tensor(node: fx.Node) -> bool:
        found: list[bool] = []

        def look(given: Any, declared: Any) -> None:
            found.append(isinstance(given, (float, int, bool)) and isinstance(declared.type, torch.TensorType))

        map_args(node.target, look, node.args, dict(node.kwargs))
        return any(found)

    def mixed(node: fx.Node) -> bool:
        if node.target in mixable:
            values = [a.meta.get("val") if isinstance(a, fx.Node) else a for a in node.args]
            return not all(isinstance(v, FakeTensor) for v in values) or len({v.dtype for v in values}) > 1
        return node.target in {aten.div.Tensor, aten.div.Tensor_mode}

    def symbolic(node: fx.Node) -> bool:
        values = [n.meta.get("val") for n in node.all_input_nodes]
        return any(isinstance(v, (torch.SymInt, torch.SymFloat, torch.SymBool)) for v in values)

    def among(table: Any) -> Callable[[fx.Node], bool]:
        return lambda node: isinstance(node.target, EdgeOpOverload) and node.target in table

    return {
        passes.NormalizeTransposePass: lambda n: n.target == aten.t.default,
        passes.ReplaceBrokenOpsWithFunctionalOpsPass: lambda n: n.target.is_view,  # type: ignore[union-attr]
        passes.ScalarToTensorPass: number_for_tensor,
        passes.SymToTensorPass: symbolic,
        RemoveMixedTypeOperators: mixed,
        memory.MemoryFormatOpsPass: among(memory.DimOrderOpsMap),
        memory.DimOrderOpsRevertPass: among(memory.MemoryFormatOpsMap),
        ConstPropPass: lambda n: not n.all_input_nodes,
        legalize.LegalizePortableDimOrderPass: lambda n: n.target in legalize.LegalizePortableDimOrderPass._target_ops,
    }


def _renames() -> dict[type, Callable[[Any], Any]]:
    """For each pass that only replaces operators: the function from the old operator to the new one."""
    from executorch.exir.passes.replace_aten_with_edge_pass import OpReplacePass, aten_to_edge, should_lower_to_edge
    from torch._export.passes import replace_view_ops_with_view_copy_ops_pass as views

    def copied(target: Any) -> Any:
        if not isinstance(target, torch._ops.OpOverload):
            return target
        functional = views._NON_FUNCTIONAL_OPS_TO_FUNCTIONAL_OPS.get(target)
        return functional or views.get_view_copy_of_view_op(target._schema) or target

    return {
        OpReplacePass: lambda target: aten_to_edge(target) if should_lower_to_edge(target) else target,
        views.ReplaceViewOpsWithViewCopyOpsPass: copied,
    }


@contextlib.contextmanager
def copied_retraces() -> Iterator[None]:
    """Make passes that change no node copy the graph, and make other passes run operators only for new inputs."""
    from executorch.exir import pass_base
    from executorch.exir.dialects.edge._ops import EdgeOpOverload
    from torch._export import pass_base as torch_pass_base

    base, old_base = pass_base._ExportPassBase, torch_pass_base._ExportPassBaseDeprecatedDoNotUse
    memory, changes, renames = _Memory(), _changes(), _renames()
    operators = (torch._ops.OpOverload, EdgeOpOverload)

    def plain(node: fx.Node, changed: Callable[[fx.Node], bool] | None) -> bool:
        """Whether this kind of node is supported here and the pass does not change it."""
        if node.op == "placeholder":
            val = node.meta.get("val")
            return isinstance(val, FakeTensor) and val.constant is None
        if node.op != "call_function" or isinstance(node.target, operators):
            return node.op == "output" or (node.op == "call_function" and not (changed and changed(node)))
        return node.target is operator.getitem and isinstance(node.args[0], fx.Node)

    def retrace_for(origin: type, retrace: Callable, *, keep_meta: bool) -> Callable:
        def call(self: Any, module: fx.GraphModule) -> PassResult:
            kind = type(self)
            overridden = {h for h in _HOOKS if getattr(kind, h, None) is not getattr(origin, h, None)}
            known = not overridden or (overridden == {"call_operator"} and (kind in changes or kind in renames))
            if not known or module.meta.get("args") is not None:
                return retrace(self, module)
            if not all(plain(node, changes.get(kind)) for node in module.graph.nodes):
                return retrace(self, module)
            copied = _copy(module, renames.get(kind), memory, operators)
            copied.meta = module.meta.copy() if keep_meta else {}
            return PassResult(copied, True)

        return call

    with (
        replaced(base, "call", retrace_for(pass_base.ExportPass, base.call, keep_meta=True)),
        replaced(old_base, "call", retrace_for(old_base, old_base.call, keep_meta=False)),
    ):
        yield


def _copy(module: fx.GraphModule, rename: Callable | None, memory: _Memory, operators: tuple) -> fx.GraphModule:
    """The result of a retrace: the same nodes and names, with values computed from the input values."""
    from torch._dispatch.python import enable_python_dispatcher

    graph = fx.Graph()
    graph.set_codegen(module.graph._codegen)
    nodes: dict[fx.Node, fx.Node] = {}
    values: dict[fx.Node, Any] = {}
    mode = next((n.meta["val"].fake_mode for n in module.graph.nodes if n.op == "placeholder"), None)
    with contextlib.ExitStack() as stack:
        if mode is not None:
            mode.allow_non_fake_inputs = True
            stack.enter_context(mode)
            stack.enter_context(enable_python_dispatcher())
        for node in module.graph.nodes:
            target = rename(node.target) if rename is not None and node.op == "call_function" else node.target
            name = None
            if isinstance(target, torch._ops.OpOverload):
                name = graph._target_to_str(target.overloadpacket.__name__)
            args, kwargs = (fx.map_arg(given, nodes.__getitem__) for given in (node.args, node.kwargs))
            if node.op == "placeholder":
                args, value = (), node.meta["val"]
            elif node.op == "output":
                value = fx.map_arg(node.args[0], values.__getitem__)
            elif isinstance(target, operators):
                inputs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                value = memory.run(target, inputs[0], inputs[1], functools.partial(target, *inputs[0], **inputs[1]))
            else:  # getitem
                value = values[node.args[0]][node.args[1]]
            copy = graph.create_node(node.op, target, args, kwargs, name)
            copy.meta = {**node.meta, "val": value}
            if node.op != "placeholder":
                copy.meta["tensor_meta"] = pytree.tree_map(lambda _: None, value)
            nodes[node], values[node] = copy, value
    return fx.GraphModule(torch.nn.Module(), graph)
