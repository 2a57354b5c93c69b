"""Walking a prepared graph node by node, as the float network that it was and the integer network that it will be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from quantflow.conversion.biases import as_converted
from quantflow.graph.aten import op
from quantflow.graph.parameters import is_constant, tensor_of
from quantflow.graph.state import is_written, writes_for_others
from quantflow.observers import PerGroupMinMaxObserver
from quantflow.observers.observation import observer_of, qparams_of
from quantflow.qparams.per_token import is_per_token, round_per_token
from quantflow.qparams.qparams import PER_CHANNEL, SYMMETRIC, choose_qparams
from quantflow.qparams.rounding import round_to_grid
from quantflow.simulation.float_weights import attribute, given_input

# A walk has a grad mode of its own, and no autocast.
_MODES = (torch.is_grad_enabled, torch._C._set_grad_enabled, torch.amp._enter_autocast, torch.amp._exit_autocast)

Values = dict[Node, Any]


def last_reads(graph: Graph) -> dict[Node, list[Node]]:
    """For each node, the nodes whose value nothing reads after it."""
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        for read in (node, *node.all_input_nodes):
            last[read] = node
    dead: dict[Node, list[Node]] = {}
    for read, node in last.items():
        dead.setdefault(node, []).append(read)
    return dead


def evaluate(node: Node, values: Values) -> Any:
    """The value of the operator ``node``, given those of the nodes before it."""
    if node.target in _MODES:
        return None
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
    return _target(node)(*args, **kwargs)


def _target(node: Node) -> Any:
    """What to call: an in-place operator as its functional twin, unless others are to see what it writes."""
    return node.target if writes_for_others(node) else op(node)


def quantized(observer: Any, x: torch.Tensor, readers: Iterable[Node] = ()) -> torch.Tensor:
    """``x`` as ``observer`` will quantize it for the nodes that read it; these matter where its range is taken at run time."""
    if getattr(observer, "is_dynamic", False):
        if is_per_token(observer, readers):
            return round_per_token(x)
        scale, zero_point = choose_qparams(
            x.detach().min().float(),
            x.detach().max().float(),
            quant_min=observer.quant_min,
            quant_max=observer.quant_max,
            symmetric=observer.qscheme in SYMMETRIC,
        )
    elif not has_grid(observer):
        return x
    else:
        scale, zero_point = qparams_of(observer)
    if isinstance(observer, PerGroupMinMaxObserver):  # the groups of a weight are rows of their own
        rows, scale, zero_point = x.reshape(-1, observer.group), scale.reshape(-1), zero_point.reshape(-1)
        return round_to_grid(
            rows, scale.to(x.device), zero_point.to(x.device), observer.quant_min, observer.quant_max, 0
        ).reshape(x.shape)
    axis = int(observer.ch_axis) if observer.qscheme in PER_CHANNEL else 0
    if observer.qscheme not in PER_CHANNEL:
        scale, zero_point = scale.reshape(()), zero_point.reshape(())
    return round_to_grid(x, scale.to(x.device), zero_point.to(x.device), observer.quant_min, observer.quant_max, axis)


def has_grid(observer: nn.Module) -> bool:
    """Whether ``observer`` has an integer grid of the plain kind (torchao's affine ones have another)."""
    dtype = getattr(observer, "dtype", torch.float32)
    return hasattr(observer, "qscheme") and hasattr(observer, "quant_min") and not dtype.is_floating_point


def steps(
    graph: GraphModule, batch: tuple, *, integers: bool = False, known: Values | None = None
) -> Iterator[tuple[Node, Values]]:
    """Run ``graph`` on one batch: each node in turn, the ``output`` last, with the values that live then.

    Args:
        graph: A captured or prepared graph.
        batch: Its flat inputs.
        integers: Quantize what its observers will.
        known: Values that need not be computed.
    """
    dead, given = last_reads(graph.graph), iter(batch)
    values: Values = {}
    for node in graph.graph.nodes:
        if known is not None and node in known:
            values[node] = known[node]
        elif node.op != "output":
            values[node] = value_at(graph, node, values, given, integers=integers)
        yield node, values
        for read in dead.get(node, ()):
            values.pop(read, None)


class Simulation:
    """``graph`` in float, or with what its observers quantize quantized; callable on the flat inputs of a batch.

    Observers learn nothing from it, and state is its own, which goes on from call to call. Returns all that the graph returns,
    flat.
    """

    @torch.no_grad()
    def __init__(self, graph: GraphModule, *, integers: bool = True) -> None:
        self.graph, self.integers = graph, integers
        self.constants = {
            node: quantized(observer, tensor_of(graph, node.args[0]))
            for node in graph.graph.nodes
            if integers and (observer := observer_of(node, graph)) is not None and is_constant(node.args[0])
        }
        if integers:
            self.constants |= as_converted(graph)
        self.state = {n: attribute(graph, n) for n in graph.graph.nodes if n.op == "get_attr" and is_written(n)}

    @torch.no_grad()
    def __call__(self, *batch: Any) -> list[Any]:
        result: list[Any] = []
        for node, values in steps(self.graph, batch, integers=self.integers, known=self.constants | self.state):
            if node.op == "output":
                result = returned(node, values)
        return result


def outputs(graph: GraphModule, batches: Iterable[tuple], *, integers: bool) -> list[list[torch.Tensor]]:
    """The float tensors that ``graph`` returns for each batch, in float or with what its observers quantize quantized."""
    simulation = Simulation(graph, integers=integers)
    return [_floats(simulation(*batch)) for batch in batches]


@torch.no_grad()
def peak_bytes(graph: GraphModule, batch: tuple) -> int:
    """The most memory that values of the float network take at one time for ``batch``."""
    most = 1
    for node, values in steps(graph, batch):
        if node.op not in ("get_attr", "output"):
            storages = {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for n, t in values.items()
                if isinstance(t, torch.Tensor) and n.op != "get_attr"
            }
            most = max(most, sum(storages.values()))
    return most


def value_at(graph: GraphModule, node: Node, values: Values, given: Any = (), *, integers: bool) -> Any:
    """The value of any ``node`` but the output, of those of the nodes before it; an input's is the next of ``given``."""
    if node.op == "placeholder":
        return given_input(node, next(given))
    if node.op == "get_attr":
        return attribute(graph, node)
    if node.op == "call_function":
        return evaluate(node, values)
    observer = observer_of(node, graph)
    args = map_arg(node.args, lambda n: values[n])
    if observer is None:
        return graph.get_submodule(str(node.target))(*args)
    return quantized(observer, args[0], node.users) if integers else args[0]


def returned(output: Node, values: Values) -> list[Any]:
    """What the ``output`` node returns, flat."""
    return [values[leaf] if isinstance(leaf, Node) else leaf for leaf in pytree.tree_leaves(output.args)]


def float_outputs(output: Node, values: Values) -> list[torch.Tensor]:
    """The float tensors among what the ``output`` node returns."""
    return _floats(returned(output, values))


def _floats(leaves: list[Any]) -> list[torch.Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
