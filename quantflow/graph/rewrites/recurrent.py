"""Rewrites of recurrent layers into linear layers and arithmetic, one group of operators for each time step, exact.

The input's part of all gates is one linear layer over all steps. The hidden state's part is one linear layer for each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn
from torch.fx import GraphModule, Node

from quantflow.graph import modes
from quantflow.graph.aten import argument, aten, op, tensor_value, value
from quantflow.graph.parameters import is_constant, tensor_of
from quantflow.graph.rewrites.rewriting import Replacement, Rewrite, call_before, open_sizes
from quantflow.upstream.operators import OpOverload

_STEPS = 1024  # longer sequences stay whole

# The states of a layer after one step, given the input's part of the gates and the states before: hidden state first. None is a
# state of zeros.
_Cell = Callable[["_Layer", Node, Sequence[Node | None]], list[Node]]


@dataclass(frozen=True)
class _Layer:
    """One direction of one recurrent layer.

    Attributes:
        module: The graph.
        node: The recurrent operator.
        hidden: The number of features of the hidden state.
        recurrent: The weight of the hidden state, and its bias or None.
    """

    module: GraphModule
    node: Node
    hidden: int
    recurrent: tuple[Node, Node | None]

    def call(self, target: OpOverload, *args: object) -> Node:
        return call_before(self.node, target, *args)  # type: ignore[arg-type]

    def from_hidden(self, state: Node | None) -> Node | None:
        """The hidden state's part of the gates; None if that is zero."""
        weight, bias = self.recurrent
        return bias if state is None else self.call(aten.linear.default, state, weight, bias)

    def plus(self, given: Node, other: Node | None) -> Node:
        return given if other is None else self.call(aten.add.Tensor, given, other)

    def gate(self, gates: Node, index: int) -> Node:
        last = tensor_value(gates).ndim - 1
        return self.call(aten.slice.Tensor, gates, last, index * self.hidden, (index + 1) * self.hidden)


def _lstm_cell(layer: _Layer, given: Node, states: Sequence[Node | None]) -> list[Node]:
    hidden, cell = states
    gates = layer.plus(given, layer.from_hidden(hidden))
    written, shown = (layer.call(aten.sigmoid.default, layer.gate(gates, index)) for index in (0, 3))
    new = layer.call(aten.mul.Tensor, written, layer.call(aten.tanh.default, layer.gate(gates, 2)))
    if cell is not None:
        kept = layer.call(aten.sigmoid.default, layer.gate(gates, 1))
        new = layer.call(aten.add.Tensor, layer.call(aten.mul.Tensor, kept, cell), new)
    return [layer.call(aten.mul.Tensor, shown, layer.call(aten.tanh.default, new)), new]


def _gru_cell(layer: _Layer, given: Node, states: Sequence[Node | None]) -> list[Node]:
    (hidden,) = states
    recurrent = layer.from_hidden(hidden)
    parts = [
        [None if gates is None else layer.gate(gates, index) for index in range(3)] for gates in (given, recurrent)
    ]
    inputs = [cast(Node, part) for part in parts[0]]
    reset, kept = (
        layer.call(aten.sigmoid.default, layer.plus(part, other))
        for part, other in zip(inputs[:2], parts[1], strict=False)
    )
    shown = None if parts[1][2] is None else layer.call(aten.mul.Tensor, reset, parts[1][2])
    new = layer.call(aten.tanh.default, layer.plus(inputs[2], shown))
    if hidden is None:
        return [layer.call(aten.sub.Tensor, new, layer.call(aten.mul.Tensor, kept, new))]
    moved = layer.call(aten.mul.Tensor, kept, layer.call(aten.sub.Tensor, hidden, new))
    return [layer.call(aten.add.Tensor, new, moved)]


def _rnn_cell(activation: OpOverload) -> _Cell:
    def cell(layer: _Layer, given: Node, states: Sequence[Node | None]) -> list[Node]:
        return [layer.call(activation, layer.plus(given, layer.from_hidden(states[0])))]

    return cell


def _recurrent(cell: _Cell, count: int) -> Rewrite:
    """The rewrite of a recurrent operator with so many states."""

    def rewritten(module: GraphModule, node: Node) -> Replacement:
        x, given = argument(node, "input"), argument(node, "hx")
        states = list(given) if isinstance(given, (list, tuple)) else [given]
        parameters, biases = list(argument(node, "params")), bool(argument(node, "has_biases"))
        layers, both = argument(node, "num_layers"), bool(argument(node, "bidirectional"))
        first = bool(argument(node, "batch_first"))
        each = 4 if biases else 2
        runs = layers * (2 if both else 1)
        if value(x) is None or tensor_value(x).ndim != 3 or len(states) != count or len(parameters) != each * runs:
            return None  # an unbatched call, or a projection of the hidden state
        steps, sizes = tensor_value(x).shape[1 if first else 0], open_sizes(tensor_value(x).shape, 0 if first else 1)
        if not isinstance(steps, int) or not 0 < steps <= _STEPS or sizes is None:
            return None
        if not first:
            x = call_before(node, aten.transpose.int, x, 0, 1)
        last: list[list[Node]] = []
        for number in range(layers):
            if number and argument(node, "dropout"):
                x = call_before(node, aten.dropout.default, x, argument(node, "dropout"), argument(node, "train"))
                x.meta |= {modes.SWITCHED: "train"} if modes.SWITCHED in node.meta else {}
            outputs = []
            for backwards in range(2 if both else 1):
                run = number * (2 if both else 1) + backwards
                weights = parameters[each * run : each * (run + 1)]
                start = [_state(module, node, state, run) for state in states]
                found, ends = _unrolled(module, node, cell, x, weights, start, steps, bool(backwards))
                outputs.append(found)
                last.append(ends)
            x = call_before(node, aten.cat.default, outputs, 2) if both else outputs[0]
        joined = [_joined(node, [ends[index] for ends in last], 0) for index in range(count)]
        return [x if first else call_before(node, aten.transpose.int, x, 0, 1), *joined]

    return rewritten


def _state(module: GraphModule, node: Node, state: Node, run: int) -> Node | None:
    """The first state of layer and direction ``run``, [batch, features]; None if it is zero."""
    if op(state) is aten.zeros.default or _is_folded_zero(module, state):
        return None
    one = call_before(node, aten.slice.Tensor, state, 0, run, run + 1)
    return call_before(node, aten.reshape.default, one, [-1, tensor_value(state).shape[2]])


def _is_folded_zero(module: GraphModule, state: Node) -> bool:
    tensor = tensor_of(module, state) if is_constant(state) else None
    return tensor is not None and not isinstance(tensor, nn.Parameter) and not tensor.any()


def _unrolled(
    module: GraphModule,
    node: Node,
    cell: _Cell,
    x: Node,
    weights: Sequence[Node],
    states: Sequence[Node | None],
    steps: int,
    backwards: bool,
) -> tuple[Node, list[Node]]:
    """The outputs of one direction of one layer, [batch, steps, features], and its last states."""
    biased = len(weights) == 4
    layer = _Layer(module, node, tensor_value(weights[1]).shape[1], (weights[1], weights[3] if biased else None))
    gates = call_before(node, aten.linear.default, x, weights[0], weights[2] if biased else None)
    outputs: dict[int, Node] = {}
    for step in reversed(range(steps)) if backwards else range(steps):
        one = layer.call(aten.slice.Tensor, gates, 1, step, step + 1)
        given = layer.call(aten.reshape.default, one, [-1, tensor_value(gates).shape[2]])
        states = found = cell(layer, given, states)
        outputs[step] = found[0]
    return _joined(node, [outputs[step] for step in range(steps)], 1), found


def _joined(node: Node, rows: Sequence[Node], dim: int) -> Node:
    """``rows``, each [batch, features], along a new dimension ``dim``."""
    features = tensor_value(rows[0]).shape[1]
    shape = [-1, 1, features] if dim else [1, -1, features]
    parts = [call_before(node, aten.reshape.default, row, shape) for row in rows]
    return call_before(node, aten.cat.default, parts, dim) if len(parts) > 1 else parts[0]


RECURRENT_REWRITES: dict[OpOverload, Rewrite] = {
    aten.lstm.input: _recurrent(_lstm_cell, 2),
    aten.gru.input: _recurrent(_gru_cell, 1),
    aten.rnn_tanh.input: _recurrent(_rnn_cell(aten.tanh.default), 1),
    aten.rnn_relu.input: _recurrent(_rnn_cell(aten.relu.default), 1),
}
