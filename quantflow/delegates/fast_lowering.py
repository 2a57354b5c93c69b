"""Lowering through executorch in a quarter to half of its time, to the same bytes.

Only this module and ``fast_retraces.py`` use executorch's private names. While :func:`fast_lowering` is active, some of these
names are replaced by functions that give the same result with less work:

- the code of a graph is generated when it is called, not after each edit;
- patterns that the graph can't match (bilinear, attention) are not traced;
- a program is decomposed only if something is left to decompose, and then by a faster method;
- the verifier takes the operators' results from the graph instead of running it again;
- a pass that would retrace a graph without changing it copies the graph instead, and operators run on fake tensors only for
  new inputs (23 of the 25 retraces of MobileNetV2 change nothing);
- the outputs of a delegate are read from its graph, not traced through the whole graph.

Nothing is replaced for versions that were not measured, or if a name is missing. The replaced names are global, so one lowering
at a time is fast and others wait for it.
"""

from __future__ import annotations

import contextlib
import importlib
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.graph import _PyTreeCodeGen
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

from quantflow.delegates import fast_retraces
from quantflow.delegates.fast_retraces import copied_retraces
from quantflow.errors import QuantflowWarning
from quantflow.upstream.decomposition import fast_decomposition
from quantflow.upstream.replaced import exclusively, replaced
from quantflow.upstream.versions import supported

T = TypeVar("T")

_FILES = frozenset({__file__, fast_retraces.__file__})
# Functions of these modules that only call the function that they replace.
_PASSING = frozenset({"run_fast", "call", "call_if_possible", "run_decompositions", "forward"})


@contextlib.contextmanager
def fast_lowering() -> Iterator[bool]:
    """Make executorch's lowering fast within the context; yields whether it is fast."""
    with exclusively(), contextlib.ExitStack() as stack:
        yield supported() and _enter(stack)


def run_fast(lower: Callable[[], T]) -> T:
    """Run ``lower()`` fast. A failure that executorch did not report itself is retried without the replacements and warned of.

    Raises:
        Exception: the same exception as executorch without the replacements.
    """
    with fast_lowering() as fast:
        try:
            return lower()
        except Exception as error:
            if not fast or _is_refusal(error):
                raise
            failure = f"{type(error).__name__}: {str(error)[:300]}"
    made = lower()
    reason = f"fast lowering failed, so executorch's own ran, which takes two to four times as long ({failure})"
    remedy = "the program is the same; report the message and the model to quantflow"
    warnings.warn(QuantflowWarning("edge", reason, node="fast lowering", remedy=remedy), stacklevel=3)
    return made


def _is_refusal(error: BaseException) -> bool:
    """Whether executorch raised ``error`` itself, with no function of these modules involved."""
    links = [error]
    while (below := links[-1].__cause__ or links[-1].__context__) is not None:
        links.append(below)
    frames = [[frame for frame, _ in traceback.walk_tb(link.__traceback__)] for link in links]
    ours = {frame.f_code.co_name for walked in frames for frame in walked if frame.f_code.co_filename in _FILES}
    said_by = frames[-1][-1].f_globals.get("__name__", "") if frames[-1] else ""
    slips = (LookupError, AttributeError, TypeError, AssertionError, NameError)  # raised for an unexpected graph
    return ours <= _PASSING and said_by.startswith("executorch.") and not isinstance(links[-1], slips)


def _enter(stack: contextlib.ExitStack) -> bool:
    patches = (_code_when_called, _no_bilinear_patterns, _attention_patterns, fast_decomposition, _decompose_once)
    try:
        for patch in (*patches, _verify_by_values, copied_retraces, _delegates_by_values):
            stack.enter_context(patch())
    except (ImportError, AttributeError):
        stack.close()
        return False
    return True


@contextlib.contextmanager
def _code_when_called() -> Iterator[None]:
    """``GraphModule.recompile`` leaves a stub. The code is generated when it is called or read, or at the end."""
    write, code = fx.GraphModule.recompile, fx.GraphModule.code
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
        replaced(fx.GraphModule, "recompile", recompile),
        replaced(fx.GraphModule, "code", property(read)),
        replaced(fx.GraphModule, "__str__", describe),
    ):
        try:
            yield
        finally:
            for module in list(pending):
                write(module)


def _no_bilinear_patterns() -> contextlib.AbstractContextManager:
    """No bilinear pattern is traced: each pattern is the undecomposed operator itself, which needs no replacement."""
    from executorch.backends.xnnpack.partition.graphs import bilinear_2d

    return replaced(bilinear_2d, "get_graphs_dict", dict)


def _attention_patterns() -> contextlib.AbstractContextManager:
    """Both attention patterns contain a softmax of a sum (the mask). A graph without this softmax can't match."""
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
        with replaced(convert_to_sdpa, "sdpa", NoPatterns):
            return call(self, module)

    return replaced(convert_to_sdpa.ConvertToSDPAPass, "call", call_if_possible)


def _decompose_once() -> contextlib.AbstractContextManager:
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


def _verify_by_values() -> contextlib.AbstractContextManager:
    """The dtype check reads the values recorded on the nodes."""
    from executorch.exir.verification import verifier
    from executorch.exir.verification.arg_validator import EdgeOpArgValidator

    class Recorded(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            return self.node.meta["val"]  # type: ignore[attr-defined]

    class Validator(EdgeOpArgValidator, Recorded):  # its super() calls end in Recorded
        pass

    return replaced(verifier, "EdgeOpArgValidator", Validator)


def _delegates_by_values() -> contextlib.AbstractContextManager:
    """A delegate called with fake tensors of its own shapes returns the outputs recorded in its graph, without a trace."""
    calls = importlib.import_module("torch._higher_order_ops.executorch_call_delegate")  # an operator has this name too
    trace = calls.call_delegate_cpu

    def same(given: Any, seen: Any) -> bool:
        """Whether both are fake tensors of one layout. Symbolic sizes never match, because they belong to their own graph."""
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

    return replaced(calls, "call_delegate_cpu", call)
