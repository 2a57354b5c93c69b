"""A pass that would retrace a graph without changing it copies the graph instead.

Names: ``NodeSource`` and ``NodeSourceAction`` of ``torch.fx.traceback``; ``call`` of
``executorch.exir.pass_base._ExportPassBase`` and of ``torch._export.pass_base._ExportPassBaseDeprecatedDoNotUse``, which are
replaced; ``torch.fx.Graph._target_to_str``.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.fx.traceback import NodeSource, NodeSourceAction

from quantflow.upstream import pytree
from quantflow.upstream.fake_tensors import FakeTensor, enable_python_dispatcher
from quantflow.upstream.graph_modules import codegen_of
from quantflow.upstream.lowering import pass_effects
from quantflow.upstream.lowering.operator_results import OperatorResults
from quantflow.upstream.operators import OpOverload
from quantflow.upstream.replaced import replaced


@contextlib.contextmanager
def copied_retraces() -> Iterator[None]:
    """Make passes that change no node copy the graph, and make other passes run operators only for new inputs."""
    from executorch.exir import pass_base
    from torch._export import pass_base as torch_pass_base

    from quantflow.upstream.edge_operators import EdgeOpOverload

    base, old_base = pass_base._ExportPassBase, torch_pass_base._ExportPassBaseDeprecatedDoNotUse
    memory, changes, renames = OperatorResults(), pass_effects.changes(), pass_effects.renames()
    operators = (OpOverload, EdgeOpOverload)

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
            overridden = {h for h in pass_effects.HOOKS if getattr(kind, h, None) is not getattr(origin, h, None)}
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


def _copy(module: fx.GraphModule, rename: Callable | None, memory: OperatorResults, operators: tuple) -> fx.GraphModule:
    """The result of a retrace: the same nodes and names, with values computed from the input values."""
    graph = fx.Graph()
    graph.set_codegen(codegen_of(module.graph))
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
            if isinstance(target, OpOverload):
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
                # Functionalization makes nodes without provenance, which a retrace would give them.
                copy.meta.setdefault("from_node", [NodeSource(node, "", NodeSourceAction.CREATE)])
            nodes[node], values[node] = copy, value
    return fx.GraphModule(torch.nn.Module(), graph)
