"""Layer comparison: the float network and its quantized form on the same data."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, GraphModule, Node

from quantflow.analysis.diagnosis import Diagnosis, LayerErrors
from quantflow.analysis.error_statistics import Sums
from quantflow.analysis.integer_ranges import Grid, rounded_constant
from quantflow.analysis.node_matching import computes, converts, matches, source, vanishes
from quantflow.analysis.reference import reference_values
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.aten import (
    LINEARS,
    WEIGHTED,
    aten,
    label,
    layer,
    node_argument,
    op,
    short_name,
    value,
)
from quantflow.graph.parameters import is_constant
from quantflow.graph.state import overwritten, state_reads, written_by
from quantflow.simulation.float_weights import attribute
from quantflow.simulation.interpreter import Interpreter, Values, evaluate
from quantflow.upstream.operators import packet_name

_LAST = LINEARS | {aten.layer_norm.default, aten.embedding.default}


@dataclass
class _LayerOutput:
    """The quantized output of a node: its dequantize node, or the node itself where it stays in float."""

    node: Node
    end: Node
    grid: Grid | None
    relayed: bool  # it has the quantization parameters of its inputs, and so no error of its own
    sums: Sums


class LayerComparison:
    """Sums of the errors of each layer, batch by batch; tensors that are written in place are left out.

    Args:
        reference: The float network, as :func:`reference_graph` gives it.
        converted: The quantized one.

    Raises:
        QuantflowError: at stage ``"diagnose"``, when they have no layer in common.
    """

    def __init__(self, reference: GraphModule, converted: GraphModule) -> None:
        self.reference, self.converted = reference, converted
        self.matches = matches(converted.graph, reference.graph)
        if not any(computes(node) for node in self.matches):
            remedy = "pass the float graph that the quantized one was made from"
            raise QuantflowError(
                "diagnose", "the graphs have no layer in common", node="quantized_graph", remedy=remedy
            )
        self.constants, self.states = _constants(converted), state_reads(converted.graph)
        self._warn_of_missing()
        self.layer_outputs = list(self._layer_outputs())
        self.outputs = 0

    def _warn_of_missing(self) -> None:
        """Warn of the layers of the float network that have no match in the quantized one."""
        met: set[Node] = set()
        for node, match in self.matches.items():
            while vanishes(match) and op(match) is not op(node):
                match = node_argument(match)
            if op(match) is op(node):
                met.add(match)
        missing = [label(n) for n in self.reference.graph.nodes if op(n) in WEIGHTED and n not in met]
        if missing:
            names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            reason = "the quantized graph has it in another form: errors of its weights show in the next layer that both have"
            remedy = (
                "none is needed where the quantizer wrote the layer as others; else pass the graph it was made from"
            )
            warnings.warn(QuantflowWarning("diagnose", reason, node=names, remedy=remedy), stacklevel=4)

    def _layer_outputs(self) -> Iterable[_LayerOutput]:
        nodes, unclear = list(self.converted.graph.nodes), _overwritten_later(self.converted.graph)
        ends: dict[Node, dict[tuple, Node]] = {}
        for node in nodes:
            if _dequantizes(node) and node not in self.constants:
                ends.setdefault(source(node), {}).setdefault(node.args[:3], node)
        for node in nodes:
            if node in self.constants or node in unclear or not (computes(node) or node.op == "placeholder"):
                continue
            for end in ends.get(node, {}).values():
                given = [n for n in node.all_input_nodes if _dequantizes(n) and n not in self.constants]
                grids = {n.args[1:] for n in given}
                relayed = computes(node) and grids == {end.args[1:]}
                yield _LayerOutput(node, end, Grid.of(end, self.converted), relayed, Sums(_axis(node)))
            if node not in ends and node in self.matches and computes(node):
                yield _LayerOutput(node, node, None, True, Sums(_axis(node)))

    @torch.no_grad()
    def add(self, flat: Sequence[object]) -> None:
        """Add one batch of flat inputs."""
        floats, gradients, returned = reference_values(self.reference, flat)
        self.outputs = sum(y[0].numel() if y.ndim else 1 for y in returned)
        running = Values()  # the quantized network's own
        Interpreter(self.converted).outputs(flat, values=running, keep=True)
        exact, local, floors = self._locally(floats, running, flat)
        ranges = self._ranges(exact)
        for layer_output in self.layer_outputs:
            y = exact.get(layer_output.node)
            if not isinstance(y, torch.Tensor) or not y.is_floating_point() or not y.numel():
                continue
            found = local[layer_output.node if layer_output.relayed else layer_output.end]
            if found.shape != y.shape:
                continue
            floor = floors.get(layer_output.node, y)
            if layer_output.grid is not None and not layer_output.relayed:
                floor = layer_output.grid.laid_over(floor, *ranges[layer_output.end.args[1:]])
            gradient = gradients.get(self.matches[layer_output.node]) if layer_output.node in self.matches else None
            layer_output.sums.examples += len(y) if gradient is not None and y.ndim else 0
            layer_output.sums.add(y, found, floor, running[layer_output.end], gradient)
            if layer_output.grid is not None and layer_output.grid.scale is not None:
                layer_output.sums.place(y, layer_output.grid.ends, layer_output.grid.scale)

    def _locally(self, floats: Values, running: Values, flat: Sequence[object]) -> tuple[Values, Values, Values]:
        """By node: its float value; its quantized value computed from float inputs; and its value from float inputs and weights
        rounded to as many levels over their extremes, before its own rounding.
        """
        exact, local, floors = Values(), Values(), Values()
        exact |= zip(self.states, flat[len(flat) - len(self.states) :], strict=True)
        for node in self.converted.graph.nodes:
            if node.op == "get_attr":
                exact[node] = local[node] = exact[node] if node in exact else attribute(self.converted, node)
                continue
            if node in self.constants or node.op in ("call_module", "output"):
                exact[node] = local[node] = running.get(node)
                continue
            match = self.matches.get(node)
            if converts(node):
                exact[node] = exact[source(node)]
                local[node] = evaluate(node, _with_copy(node, local))
            elif node.op == "placeholder":
                exact[node] = local[node] = running[node]
            else:
                inputs: Values = {n: exact[n] for n in node.all_input_nodes}
                local[node] = evaluate(node, _with_copy(node, inputs))
                exact[node] = local[node] if match is None else floats[match]
                if match is not None:
                    floors[node] = self._floors(node, match, inputs, floats)
        return exact, local, floors

    def _floors(self, node: Node, match: Node, inputs: Values, floats: Values) -> torch.Tensor:
        """The value of ``node`` from float inputs and the float weights rounded to as many levels over their extremes."""
        quantized = [n for n in node.all_input_nodes if n in self.constants and converts(n)]
        first = match
        while op(first) is not op(node) and vanishes(first) and isinstance(first.args[0], Node):
            first = first.args[0]
        if not quantized or op(first) is not op(node) or len(first.args) != len(node.args):
            return floats[match]
        swapped = dict(inputs)
        for ours, theirs in zip(node.args, first.args, strict=True):
            if not isinstance(ours, Node) or not isinstance(theirs, Node):
                continue
            if ours in quantized:
                rounded = rounded_constant(ours, inputs[ours], floats[theirs])
                swapped[ours] = inputs[ours] if rounded is None else rounded
            elif is_constant(ours) and floats[theirs].shape == inputs[ours].shape:
                swapped[ours] = floats[theirs]
        y = evaluate(node, _with_copy(node, swapped))
        behind: Values = {first: y}
        while first is not match:  # clamps that saturation replaces
            first = next(iter(first.users))
            behind[first] = evaluate(first, {**floats, **behind})
        return behind[match]

    def _ranges(self, exact: Values) -> dict[tuple, tuple[torch.Tensor, torch.Tensor]]:
        """The extremes of the float values, over all tensors that share quantization parameters."""
        found: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}
        for layer_output in self.layer_outputs:
            y = exact.get(layer_output.node)
            if layer_output.grid is None or not isinstance(y, torch.Tensor) or not y.numel():
                continue
            low, high = y.aminmax()
            key = layer_output.end.args[1:]
            if key in found:
                low, high = torch.minimum(low, found[key][0]), torch.maximum(high, found[key][1])
            found[key] = low, high
        return found

    def diagnosis(self) -> Diagnosis:
        """The comparison over all batches so far.

        Raises:
            QuantflowError: at stage ``"diagnose"``, when there was no data.
        """
        seen = [layer_output for layer_output in self.layer_outputs if layer_output.sums.count]
        if not seen:
            remedy = "pass at least one batch, of float tensors"
            raise QuantflowError("diagnose", "there is no data", node="data", remedy=remedy)
        worst: dict[Node, _LayerOutput] = {}
        for layer_output in seen:
            if layer_output.node not in worst or layer_output.sums.excess > worst[layer_output.node].sums.excess:
                worst[layer_output.node] = layer_output
        found = []
        for node, layer_output in worst.items():
            kind = "input" if node.op == "placeholder" else short_name(op(node))
            ends = None if layer_output.grid is None or layer_output.grid.scale is None else layer_output.grid.ends
            found.append(LayerErrors.of((node.name, layer(node), kind), layer_output.sums, self.outputs, ends))
        return Diagnosis(tuple(sorted(found, key=lambda errors: -errors.excess)))


def _overwritten_later(graph: Graph) -> set[Node]:
    """The nodes that are not compared: their values, or values that they read, are overwritten in place later."""
    written = overwritten(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    last = max((order[node] for node in written if written_by(node) is not None), default=-1)
    before = [node for node in graph.nodes if order[node] < last]
    return set(written) | {node for node in before if any(source(n) in written for n in node.all_input_nodes)}


def _with_copy(node: Node, values: Values) -> Values:
    """``values`` with a copy of the tensor that ``node`` writes in place."""
    base = written_by(node)
    return values if base is None else {**values, base: values[base].clone()}


def _dequantizes(node: Node) -> bool:
    return converts(node) and packet_name(node.target).startswith("dequantize")


def _constants(graph: GraphModule) -> set[Node]:
    """The nodes whose value depends on no input of the network."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        given = node.all_input_nodes
        if node.op == "get_attr" or (node.op == "call_function" and given and all(n in found for n in given)):
            found.add(node)
    return found


def _axis(node: Node) -> int:
    """The dimension of the node's value that holds channels."""
    val = value(node)
    ndim = 4 if val is None else val.ndim
    return ndim - 1 if op(node) in _LAST or ndim <= 2 else 1
