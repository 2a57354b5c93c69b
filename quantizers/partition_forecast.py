"""The forecast of partitioning: the operators that the delegate will run, and the number of its calls."""

from __future__ import annotations

import copy
import functools
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import Argument

from quantflow.graph.aten import INFERENCE_IDENTITIES, aten, is_inplace, is_view, node_argument, op, short_name
from quantflow.graph.batch_norm import normed_layer
from quantflow.graph.constants import constant_calls
from quantflow.graph.partitioning import delegate_calls
from quantflow.graph.rewrites import BROADCAST_REWRITES, Rewrite, rewrite
from quantflow.graph.rewrites.rewriting import Replacement, inserted_between
from quantflow.upstream import pytree
from quantflow.upstream.fake_tensors import FakeTensor, FakeTensorMode
from quantflow.upstream.operators import OpOverload
from quantizers.kernels import FloatKernels


@dataclass(frozen=True)
class Forecast:
    """What a backend's delegate will run, for static shapes.

    Attributes:
        calls: How many times the program will call the delegate.
        floating: Core ATen operators that the delegate will run in float, by name.
        portable: Core ATen operators left to portable kernels, by name.
        outside: The planned nodes of which some part is left to portable kernels.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x).cumsum(1)
        >>> plan = XNNPACKQuantizer().plan(qf.export(Model(8, 4).eval(), (torch.randn(1, 8),)).module())
        >>> plan.forecast.calls, dict(plan.forecast.portable)
        (1, {'cumsum': 1})
    """

    calls: int
    floating: Counter[str] = field(default_factory=Counter)
    portable: Counter[str] = field(default_factory=Counter)
    outside: frozenset[Node] = frozenset()


def forecast(
    graph: Graph, integer: Set[Node], dynamic: Set[Node], constants: Set[Node], kernels: FloatKernels
) -> Forecast:
    """Lower ``graph`` to core ATen, and assign its operators to the delegate or to portable kernels.

    Args:
        graph: The planned graph.
        integer: The nodes that are quantized.
        dynamic: Those of them that are dynamically quantized, so that they read and write float.
        constants: The calls that follow from constants alone, which were left to be computed at each call.
        kernels: The operators that the backend runs in float.
    """
    lowered = _Lowered(graph, integer, constants, kernels)
    parts, static = Counter(lowered.origins.values()), integer - dynamic
    delegated: set[Node] = set()
    floating, portable, outside = Counter[str](), Counter[str](), set()
    for node in lowered.graph.nodes:
        if node.op != "call_function":
            continue
        origin = lowered.origins[node]
        if node.target is operator.getitem:
            inside = node.args[0] in delegated
        elif origin in integer and parts[origin] == 1:
            inside = True
        else:
            inside = kernels.run(node)
            around = {lowered.origins.get(n) for n in (*node.all_input_nodes, *node.users)}
            if not inside:
                portable[short_name(node.target)] += 1
            elif node.target not in kernels.between or not around <= static:
                floating[short_name(node.target)] += 1
        if inside:
            delegated.add(node)
        else:
            outside.add(origin)
    found = delegate_calls(lowered.graph, delegated)
    return Forecast(len({found[node] for node in delegated}), floating, portable, frozenset(outside))


class _Lowered:
    """``graph`` in core ATen, except quantized nodes; each ``val`` is a fake tensor of static shape."""

    def __init__(self, graph: Graph, integer: Set[Node], constants: Set[Node], kernels: FloatKernels) -> None:
        self.graph, self.integer, self.kernels = Graph(), integer, kernels
        self.origins: dict[Node, Node] = {}
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._values: dict[Node, Any] = {}  # by node of the rewritten graph: a lowered node, or a number
        self._decomposed: dict[tuple, Graph] = {}
        self._folded = constant_calls(graph, sizes_known=True) - constants  # by lowering, in static shapes
        self._planned = _rewritten(graph, kernels.rewrites)  # by node of the rewritten graph: the node of ``graph``
        for node in self._planned:
            if node.op != "output":
                self._values[node] = self._lower(node)

    def _lower(self, node: Node) -> Any:
        if not _is_tensor(node.meta.get("val")):
            return self._static(node.meta.get("val"))
        if node.op != "call_function" or self._planned[node] in self._folded:
            read = self.graph.create_node(_READS.get(node.op, node.op), str(node.target), name=node.name)
            read.meta["val"] = self._static(node.meta["val"])
            return read
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self._values.__getitem__)
        if op(node) in INFERENCE_IDENTITIES or normed_layer(node) is not None or self._changes_nothing(node):
            return args[0]
        result = self._call(node, op(node), args, kwargs)
        if is_inplace(node):
            self._write(node_argument(node), cast(Node, result))
        return result

    def _call(self, node: Node, target: Callable, args: tuple, kwargs: dict) -> Argument:
        call = self.graph.call_function(target, args, kwargs)
        call.meta["val"] = self._static(node.meta["val"])
        self.origins[call] = self._planned[node]
        kept = target in self.kernels.whole and self.kernels.run(call)
        if (self._planned[node] in self.integer and target not in _RESHAPES) or kept or not _decomposes(target):
            return call
        body = self._decomposition(target, args, kwargs)
        self.graph.erase_node(call)
        del self.origins[call]
        tensors = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Node)]
        copies = dict(zip(body.find_nodes(op="placeholder"), tensors, strict=True))
        for inner in body.nodes:
            if inner.op == "call_function":
                copies[inner] = self.graph.node_copy(inner, copies.__getitem__)
                copies[inner].meta = {"val": self._static(inner.meta["val"])}
                self.origins[copies[inner]] = self._planned[node]
        returned = body.output_node().args[0]
        if isinstance(returned, Node):
            return copies[returned]
        return torch.fx.map_arg(returned, copies.__getitem__)

    def _decomposition(self, target: Callable, args: tuple, kwargs: dict) -> Graph:
        """The core ATen graph of ``target``, as a function of its tensor arguments."""
        given = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        leaves, structure = pytree.tree_flatten(given)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        key = (target, structure, *(_form(leaf) for leaf in leaves))
        if key not in self._decomposed:

            def run(*tensors: torch.Tensor) -> Any:
                filled = list(leaves)
                for i, tensor in zip(where, tensors, strict=True):
                    filled[i] = tensor
                args, kwargs = pytree.tree_unflatten(filled, structure)
                return target(*args, **kwargs)

            with torch.no_grad():
                traced = make_fx(run, decomposition_table=_decompositions())(*(leaves[i] for i in where))
            traced.graph.eliminate_dead_code()
            self._decomposed[key] = traced.graph
        return self._decomposed[key]

    def _write(self, base: Node, written: Node) -> None:
        """Replace ``base`` by ``written`` for all later readers, and update the tensors of which ``base`` is a view."""
        while is_view(base):
            self._values[base] = written
            part, base = base, node_argument(base)
            scatter = _SCATTERS.get(op(part))
            if scatter is not None:
                whole = self._values[base]
                written = self.graph.call_function(scatter, (whole, written))
                written.meta["val"] = whole.meta["val"]
                self.origins[written] = self._planned[part]
        self._values[base] = written

    def _changes_nothing(self, node: Node) -> bool:
        """Whether ``node`` is a slice of the whole tensor, or an expansion to the shape that its source has in the example."""
        if op(node) is aten.slice.Tensor:
            return node.meta["val"].shape == node_argument(node).meta["val"].shape
        if op(node) not in BROADCAST_REWRITES:
            return False
        return self._static(node.meta["val"]).shape == self._static(node_argument(node).meta["val"]).shape

    def _static(self, val: Any) -> Any:
        """``val`` with the sizes of the example inputs."""
        if isinstance(val, (tuple, list)):
            return type(val)(map(self._static, val))
        if not isinstance(val, torch.Tensor):
            return _hint(val)
        with self._mode:
            sizes, strides = map(_hint, val.shape), map(_hint, val.stride())
            return torch.empty_strided(tuple(sizes), tuple(strides), dtype=val.dtype)


def _rewritten(graph: Graph, rewrites: Mapping[OpOverload, Rewrite]) -> dict[Node, Node]:
    """The nodes of ``graph`` after ``rewrites``, in order, each with the node of ``graph`` that it is or replaces."""
    if not any(op(node) in rewrites for node in graph.nodes):
        return {node: node for node in graph.nodes}
    module = GraphModule(graph.owning_module or nn.Module(), copy.deepcopy(graph))
    planned = dict(zip(module.graph.nodes, graph.nodes, strict=True))

    def recorded(apply: Rewrite) -> Rewrite:
        def applied(module: GraphModule, node: Node) -> Replacement:
            before = node.prev
            result = apply(module, node)
            planned.update(dict.fromkeys(inserted_between(before, node), planned[node]))
            return result

        return applied

    rewrite(module, {target: recorded(apply) for target, apply in rewrites.items()})
    for node in module.graph.nodes:
        if node not in planned:  # a copy that a rewrite needs
            planned[node] = planned[node.all_input_nodes[0]]
    return {node: planned[node] for node in module.graph.nodes}


_READS = {"call_function": "get_attr"}  # a folded call becomes the read of a constant

# A reshape of a tensor with another memory order becomes a copy and a view, which are not quantized in between.
_RESHAPES = frozenset({aten.reshape.default, aten.flatten.using_ints})
_SCATTERS = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}


@functools.cache
def _decompositions() -> dict[OpOverload, Callable]:
    return cast(dict[OpOverload, Callable], dict(torch.export.default_decompositions()))


def _is_tensor(val: object) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(val))


def _hint(size: Any) -> Any:
    return size.node.hint if isinstance(size, (torch.SymInt, torch.SymFloat, torch.SymBool)) else size


def _form(leaf: object) -> tuple:
    return (leaf.shape, leaf.stride(), leaf.dtype) if isinstance(leaf, FakeTensor) else (type(leaf), leaf)


def _decomposes(target: object) -> bool:
    """Whether to trace ``target`` to core ATen; core operators need no trace, data-dependent ones can't be traced."""
    unknown = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    return isinstance(target, OpOverload) and not (unknown | {torch.Tag.core}) & set(target.tags)
