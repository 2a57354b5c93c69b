"""Lowering through executorch in a quarter to half of its time, to the very same bytes.

The only room that touches executorch's inner names. While :func:`fast_lowering` is active some of them are replaced, each by
what gives the same result with less work:

- generated code of graphs is written when it is called, not after each edit;
- patterns that the graph can't match (bilinear, attention) are not traced;
- a program is not decomposed again where nothing is left to decompose, and the dispatcher is asked once for its operators;
- the verifier takes the operators' results from the graph instead of running it again;
- a pass that retraces a graph without changing it copies it instead, and operators are run on fake tensors only for inputs
  that they have not seen (of 25 retraces of MobileNetV2, 23 change nothing);
- what a delegate returns is read from its graph, not traced through all of it.

With other versions than those it was measured with, or where a name is missing, it does nothing. The names it replaces are
global: one lowering at a time is fast, others in the meantime wait.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import threading
import weakref
from collections.abc import Callable, Iterator
from importlib.metadata import version
from typing import Any, TypeVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

T = TypeVar("T")

_MEASURED_WITH = {"torch": "2.14.1", "executorch": "1.5.1"}
_LOCK = threading.RLock()


@contextlib.contextmanager
def fast_lowering() -> Iterator[bool]:
    """Make executorch's lowering fast for a while; gives whether it is."""
    with _LOCK, contextlib.ExitStack() as stack:
        yield supported() and _enter(stack)


def run_fast(lower: Callable[[], T]) -> T:
    """``lower()``, fast; where that fails, as executorch has it, so that no fault and no message is of our making."""
    with fast_lowering() as fast:
        try:
            return lower()
        except Exception:
            if not fast:
                raise
    return lower()


@functools.cache
def supported() -> bool:
    """Whether the versions here are those that this was measured with."""
    return all(version(name).split("+")[0] == wanted for name, wanted in _MEASURED_WITH.items())


def _enter(stack: contextlib.ExitStack) -> bool:
    patches = (_code_when_called, _no_bilinear_patterns, _attention_patterns, _operators_once, _decompose_once)
    try:
        for patch in (*patches, _verify_by_values, _copied_retraces, _delegates_by_values):
            stack.enter_context(patch())
    except (ImportError, AttributeError):
        stack.close()
        return False
    return True


@contextlib.contextmanager
def _replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """``owner.name`` is ``new`` for a while."""
    own, old = name in vars(owner), getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, old) if own else delattr(owner, name)


@contextlib.contextmanager
def _code_when_called() -> Iterator[None]:
    """``GraphModule.recompile`` leaves a stub; the code is written when it is called or read, and at the end."""
    write, code = fx.GraphModule.recompile, fx.GraphModule.code
    pending: weakref.WeakSet[fx.GraphModule] = weakref.WeakSet()

    def written(module: fx.GraphModule) -> Any:
        pending.discard(module)
        return write(module)

    def forward(self: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        written(self)
        return type(self).forward(self, *args, **kwargs)

    class Later:
        """Stands for the ``PythonCode`` that recompile returns."""

        def __init__(self, module: fx.GraphModule) -> None:
            self._module = module

        def __getattr__(self, name: str) -> Any:
            return getattr(written(self._module), name)

    def recompile(self: fx.GraphModule) -> Any:
        if isinstance(self._graph._codegen, _PyTreeCodeGen):
            self._in_spec = self._graph._codegen.pytree_info.in_spec
            self._out_spec = self._graph._codegen.pytree_info.out_spec
        type(self).forward = forward  # type: ignore[method-assign]
        pending.add(self)
        self._recompile_submodules()
        return Later(self)

    def read(self: fx.GraphModule) -> str:
        if self in pending:
            written(self)
        return code.fget(self)

    def describe(self: fx.GraphModule) -> str:
        return (
            f"{type(self).__name__}({len(self.graph.nodes)} nodes)"  # executorch formats whole graphs for its debug log
        )

    with (
        _replaced(fx.GraphModule, "recompile", recompile),
        _replaced(fx.GraphModule, "code", property(read)),
        _replaced(fx.GraphModule, "__str__", describe),
    ):
        try:
            yield
        finally:
            for module in list(pending):
                write(module)


def _no_bilinear_patterns() -> contextlib.AbstractContextManager:
    """Each pattern is the operator itself, undecomposed, for which the replacement returns at once."""
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d

    return _replaced(bilinear_2d, "get_graphs_dict", dict)


def _attention_patterns() -> contextlib.AbstractContextManager:
    """Both patterns hold a softmax of a sum (the mask): without one there is nothing to match."""
    from executorch.backends.xnnpack._passes import convert_to_sdpa
    from executorch.exir.dialects._ops import ops

    call = convert_to_sdpa.ConvertToSDPAPass.call
    softmax, add = ops.edge.aten._softmax.default, ops.edge.aten.add.Tensor

    class NoPatterns:
        @staticmethod
        def get_graphs() -> list:
            return []

    def call_if_possible(self: Any, module: fx.GraphModule) -> PassResult:
        sources = [n.args[0] for n in module.graph.nodes if n.target == softmax]
        if any(isinstance(s, fx.Node) and s.target == add for s in sources):
            return call(self, module)
        with _replaced(convert_to_sdpa, "sdpa", NoPatterns):
            return call(self, module)

    return _replaced(convert_to_sdpa.ConvertToSDPAPass, "call", call_if_possible)


def _operators_once() -> contextlib.AbstractContextManager:
    """The dispatcher's composite operators only fill ``torch.ops``."""
    import torch._export.utils as utils

    return _replaced(utils, "_materialize_cpp_cia_ops", functools.lru_cache(utils._materialize_cpp_cia_ops))


def _decompose_once() -> contextlib.AbstractContextManager:
    """What ``run_decompositions`` made is functional: it returns as it is where no operator of the table is in it."""
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

    return _replaced(torch.export.ExportedProgram, "run_decompositions", run_decompositions)


def _verify_by_values() -> contextlib.AbstractContextManager:
    """The dtype check looks at the values on the nodes."""
    from executorch.exir.verification import verifier
    from executorch.exir.verification.arg_validator import EdgeOpArgValidator

    class Recorded(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            return self.node.meta["val"]  # type: ignore[attr-defined]

    class Validator(EdgeOpArgValidator, Recorded):  # its super() calls end in Recorded
        pass

    return _replaced(verifier, "EdgeOpArgValidator", Validator)


def _delegates_by_values() -> contextlib.AbstractContextManager:
    """What a delegate returns for fake tensors of its own shapes is what stands in its graph: it need not be traced again."""
    calls = importlib.import_module("torch._higher_order_ops.executorch_call_delegate")  # an operator has this name too
    trace = calls.call_delegate_cpu

    def same(given: Any, seen: Any) -> bool:
        """Whether they are fake tensors of one layout; symbols among its sizes belong to the graph that they are in."""
        if not isinstance(given, FakeTensor) or not isinstance(seen, FakeTensor):
            return False
        if any(type(size) is not int for t in (given, seen) for size in (*t.shape, *t.stride())):
            return False
        ours, theirs = ((t.dtype, t.device, tuple(t.shape), t.stride()) for t in (given, seen))
        return ours == theirs

    def call(lowered: Any, *args: Any) -> Any:
        program = lowered.original_module
        graph = program.graph_module.graph
        names = set(program.graph_signature.user_inputs)
        taken = [n.meta.get("val") for n in graph.nodes if n.op == "placeholder" and n.name in names]
        (made,) = (n.args[0] for n in graph.nodes if n.op == "output")
        given: list[Any] = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in made]
        if not args or len(taken) != len(args) or not all(map(same, (*args, *given), (*taken, *given))):
            return trace(lowered, *args)
        with args[0].fake_mode, torch.no_grad():
            found = [torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device=v.device) for v in given]
        return pytree.tree_unflatten(found, program.call_spec.out_spec)

    return _replaced(calls, "call_delegate_cpu", call)


class _Memory:
    """What operators gave for inputs that were the same tensors and the same numbers."""

    _UNSURE = frozenset(
        {torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}
    )
    _PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))

    def __init__(self) -> None:
        self._found: dict[Any, tuple[Any, list[FakeTensor]]] = {}

    def run(self, target: Any, args: Any, kwargs: Any, compute: Callable[[], Any]) -> Any:
        """``compute()``, or what it gave before."""
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
            self._found[overload, key] = result, held  # holding them keeps their identities theirs
        return result

    def _key(self, given: Any, held: list[FakeTensor]) -> Any:
        if isinstance(given, FakeTensor) and given.constant is None:
            held.append(given)
            return FakeTensor, id(given)
        if isinstance(given, (list, tuple)):
            keys = tuple(self._key(g, held) for g in given)
            return None if None in keys else (type(given), keys)
        return (type(given), repr(given)) if isinstance(given, self._PLAIN) else None


# What a pass may override to change nodes as it retraces.
_HOOKS = (
    *("call_operator", "call_sym", "call_cond", "call_while", "call_map", "call_scan", "call_getitem", "call_delegate"),
    *("call_submodule", "placeholder", "output", "on_attr", "_fx", "inputs", "ExportTracer", "ExportInterpreter"),
    "should_preserve_symbolic_input_metadata",
)


def _changes() -> dict[type, Callable[[fx.Node], bool]]:
    """For passes that override ``call_operator``: whether they would do anything at this node."""
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
    """For passes that only put one operator in the place of another: which."""
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
def _copied_retraces() -> Iterator[None]:
    """Passes that change no node copy the graph; all others run operators only for inputs that are new."""
    from executorch.exir import pass_base
    from executorch.exir.dialects.edge._ops import EdgeOpOverload
    from torch._export import pass_base as torch_pass_base

    base, old_base = pass_base._ExportPassBase, torch_pass_base._ExportPassBaseDeprecatedDoNotUse
    memory, changes, renames = _Memory(), _changes(), _renames()
    operators = (torch._ops.OpOverload, EdgeOpOverload)

    def plain(node: fx.Node, changed: Callable[[fx.Node], bool] | None) -> bool:
        """Whether this kind of node is understood here, and left alone by the pass."""
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
        _replaced(base, "call", retrace_for(pass_base.ExportPass, base.call, keep_meta=True)),
        _replaced(old_base, "call", retrace_for(old_base, old_base.call, keep_meta=False)),
    ):
        yield


def _copy(module: fx.GraphModule, rename: Callable | None, memory: _Memory, operators: tuple) -> fx.GraphModule:
    """What a retrace gives: the same nodes, the same names, and values that follow from those of the inputs."""
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
