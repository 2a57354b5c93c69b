"""Serialization of captured graphs with pickle.

``torch.fx`` pickles generated source code and traces it again on loading, which loses the metadata that quantization reads
(shapes, layer names, annotations). This module writes the nodes themselves, with operators as qualified names and traced
values as shape and dtype.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import Target, map_aggregate, map_arg

from quantflow.upstream.fake_tensors import FakeTensorMode
from quantflow.upstream.graph_modules import GENERATED, codegen_of, pytree_info_of
from quantflow.upstream.operators import BUILTINS, HigherOrderOperator, OpOverload

M = TypeVar("M", bound=GraphModule)

# Metadata that is kept: plain data only. Traced values are stored as _TracedTensor.
_KEPT_META = (
    "nn_module_stack",
    "stack_trace",
    "quantflow_switched",
    "quantflow_frozen",
    "quantflow_cumulative_average",
    "quantflow_tracking",
    "quantflow_output_moments",
    "quantflow_float_weight",
    "quantflow_teacher_weight",
)


class _NodeRef(NamedTuple):
    name: str


class _Operator(NamedTuple):
    name: str  # "aten.conv2d.default" in torch.ops, or "module:qualified.name"


class _TracedTensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: torch.dtype


def dump(module: GraphModule) -> tuple:
    """Return the arguments of :func:`load` that rebuild ``module``, except its class."""
    state = {k: v for k, v in module.__dict__.items() if k not in GENERATED}
    nodes = [
        (n.name, n.op, _encode_target(n.target), _encode(n.args), _encode(n.kwargs), _encode_meta(n))
        for n in module.graph.nodes
    ]
    return state, nodes, pytree_info_of(module.graph), type(codegen_of(module.graph))


def load(cls: type[M], state: dict[str, Any], nodes: list[tuple], pytree_info: Any, codegen: type) -> M:
    """Build a module of class ``cls`` from the result of :func:`dump`."""
    graph = Graph()
    graph.set_codegen(codegen(pytree_info) if pytree_info is not None else codegen())
    env: dict[str, Node] = {}
    fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
    for name, op, target, args, kwargs, meta in nodes:
        node = graph.create_node(op, _decode(target, env), _decode(args, env), _decode(kwargs, env), name=name)
        node.meta = {k: v for k, v in meta.items() if k != "val"}
        if "val" in meta:
            with fake_mode:
                node.meta["val"] = torch.empty(meta["val"].shape, dtype=meta["val"].dtype)
        env[name] = node
    root = torch.nn.Module()
    root.__dict__.update(state)
    module = cls(root, graph)
    module.__dict__.update({k: v for k, v in state.items() if k not in module.__dict__ or k in ("training", "meta")})
    return module


def _encode_meta(node: Node) -> dict[str, Any]:
    meta: dict[str, Any] = {k: node.meta[k] for k in _KEPT_META if k in node.meta}
    val = node.meta.get("val")
    if isinstance(val, torch.Tensor):
        meta["val"] = _TracedTensor(tuple(s if isinstance(s, int) else s.node.hint for s in val.shape), val.dtype)
    return meta


def target_name(target: Target) -> str:
    """Return a name for the target of a node that is the same in every process."""
    return target if isinstance(target, str) else cast(_Operator, _encode_target(target)).name


def _encode_target(target: Target) -> _Operator | str:
    if isinstance(target, str):
        return target
    if isinstance(target, OpOverload):
        return _Operator(str(target))
    if isinstance(target, HigherOrderOperator):
        return _Operator(f"higher_order.{target.name()}")
    # Builtins such as math.trunc report the module that exports them. Builtins of torch._C report no importable module.
    module = getattr(target, "__module__", None) or BUILTINS
    return _Operator(f"{module}:{target.__qualname__}")


def _encode(tree: Any) -> Any:
    return map_aggregate(map_arg(tree, lambda n: _NodeRef(n.name)), _encode_leaf)


def _encode_leaf(leaf: Any) -> Any:
    return _encode_target(leaf) if isinstance(leaf, OpOverload) else leaf


def _decode(tree: Any, env: dict[str, Node]) -> Any:
    if isinstance(tree, _NodeRef):
        return env[tree.name]
    if isinstance(tree, _Operator):
        return _resolve(tree.name)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_decode(t, env) for t in tree)
    if isinstance(tree, dict):
        return {k: _decode(v, env) for k, v in tree.items()}
    return tree


def _resolve(name: str) -> Any:
    if ":" in name:
        module, qualname = name.split(":")
        found: Any = importlib.import_module(module)
    else:
        found, qualname = torch.ops, name
    for part in qualname.split("."):
        found = getattr(found, part)
    return found
