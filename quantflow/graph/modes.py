"""Switches a captured graph between training and inference mode on its nodes.

Export writes the mode of each layer into its call as a literal (``aten.dropout(x, 0.2, False)``). Backend quantizers match
those nodes, so the mode is changed on the node itself and no node is replaced by a module. A graph is captured in inference
mode. A node that is in training mode even then (Monte Carlo dropout, batch norm without running statistics) is in training
mode in the model too, and never changes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.fx import GraphModule, Node

from quantflow.graph.aten import argument, aten, op, set_argument
from quantflow.graph.regions import AUTOCAST, bodies_of, inputs_of

BATCH_NORM = aten.batch_norm.default

# The argument of each operator that holds its mode.
_MODE_ARGUMENT = {
    BATCH_NORM: "training",
    aten.instance_norm.default: "use_input_stats",
    aten.dropout.default: "train",
    aten.feature_dropout.default: "train",
    aten.alpha_dropout.default: "train",
    aten.feature_alpha_dropout.default: "train",
    aten.rrelu.default: "training",
    aten.lstm.input: "train",
    aten.gru.input: "train",
}

_WITH_STATISTICS = {BATCH_NORM, aten.instance_norm.default}

SWITCHED = "quantflow_switched"  # node.meta: the node follows the module's mode
FROZEN = "quantflow_frozen"  # node.meta: the model's own train() leaves the node in inference mode
CUMULATIVE = "quantflow_cumulative_average"  # node.meta: batch norm with momentum=None
TRACKING = "quantflow_tracking"  # node.meta: the node counts batches and exists in training mode only


def cumulative_average_factor(num_batches_tracked: torch.Tensor) -> float:
    """Return the momentum that makes a batch norm with ``momentum=None`` compute a cumulative moving average."""
    return 1.0 / float(num_batches_tracked)


def with_mode(nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes of ``nodes`` that call an operator with a mode."""
    return [node for node in nodes if op(node) in _MODE_ARGUMENT]


def is_training(node: Node) -> bool:
    """Whether ``node``, whose operator has a mode, is in training mode."""
    return bool(argument(node, _MODE_ARGUMENT[op(node)]))


def mark(node: Node, *, follows: bool, cumulative: bool = False) -> None:
    """Record on ``node``, whose operator has a mode, whether it follows the mode of its module.

    Args:
        node: A node of a graph in inference mode. A node in training mode does not change.
        follows: False if the model's own ``train()`` leaves the node in inference mode.
        cumulative: Whether the node is a batch norm with ``momentum=None``.
    """
    if is_training(node):
        return
    node.meta = dict(node.meta)  # export shares it with the nodes that read the result of a region
    if not follows:
        node.meta[FROZEN] = True
    if not node.meta.get(FROZEN):
        node.meta[SWITCHED] = _MODE_ARGUMENT[op(node)]
        if cumulative and op(node) is BATCH_NORM:
            node.meta[CUMULATIVE] = True


def mark_switched(nodes: Iterable[Node]) -> None:
    """Make every node of a graph in inference mode follow the mode, except frozen nodes."""
    for node in with_mode(nodes):
        mark(node, follows=True)


def mark_frozen(nodes: Iterable[Node]) -> None:
    """Freeze each node in inference mode of a graph that was captured in training mode."""
    for node in with_mode(nodes):
        if not is_training(node):
            node.meta[FROZEN] = True


def is_inference_constant(node: Node) -> bool:
    """Whether ``node``, whose operator has a mode, is in inference mode whenever the graph is."""
    return SWITCHED in node.meta or FROZEN in node.meta


def training_literals(nodes: Iterable[Node]) -> list[Node]:
    """Return the nodes in training mode that could be in inference mode."""
    training = [n for n in with_mode(nodes) if is_training(n)]
    return [n for n in training if op(n) not in _WITH_STATISTICS or argument(n, "running_mean") is not None]


def mark_all(nodes: Iterable[Node]) -> None:
    """Make every node follow the mode that can, in a graph that was captured in training mode."""
    for node in training_literals(nodes):
        node.meta[SWITCHED] = _MODE_ARGUMENT[op(node)]


def strip_tracking(graph: torch.fx.Graph) -> None:
    """Erase the batch counters that a capture in training mode wrote into ``graph``."""
    for node in reversed(graph.nodes):
        if node.target is aten.add_.Tensor and not node.users:
            counter = node
            while counter.target is aten.add_.Tensor:  # a norm that is called twice counts twice
                counter = counter.args[0]
            if counter.op in ("get_attr", "placeholder") and counter.target.endswith("num_batches_tracked"):
                graph.erase_node(node)


def switch(module: GraphModule, training: bool, *, batch_norm: bool) -> None:
    """Set the mode of every switched node of ``module``. With ``batch_norm`` False, batch norm stays in inference mode
    (frozen statistics) also in training. The caller recompiles.
    """
    graph = module.graph
    _untrack(graph)
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for node in list(graph.nodes):
        for body in bodies_of(node, module).values() if node.target is AUTOCAST and training and batch_norm else ():
            given = dict(zip(body.graph.find_nodes(op="placeholder"), inputs_of(node), strict=True))
            for inner in body.graph.nodes:
                if SWITCHED in inner.meta and op(inner) is BATCH_NORM:
                    _track(inner, given[argument(inner, "running_mean")], buffers, before=node)
        name = node.meta.get(SWITCHED)
        if name is None:
            continue
        on = training and (batch_norm or op(node) is not BATCH_NORM)
        set_argument(node, name, on)
        if on and op(node) is BATCH_NORM:
            _track(node, argument(node, "running_mean"), buffers, before=node)


def _untrack(graph: torch.fx.Graph) -> None:
    """Erase the nodes that :func:`_track` inserted."""
    for node in graph.nodes:
        if node.meta.get(CUMULATIVE):
            set_argument(node, "momentum", 0.0)
    for node in reversed(graph.nodes):
        if node.meta.get(TRACKING):
            graph.erase_node(node)


def _track(norm: Node, running_mean: Node, buffers: set[str], *, before: Node) -> None:
    """Insert nodes in front of ``before`` that count the batches of ``norm``, as the eager layer does in training mode."""
    name = str(running_mean.target).removesuffix("running_mean") + "num_batches_tracked"
    if name not in buffers:
        return
    graph = before.graph
    with graph.inserting_before(before):
        counter = graph.get_attr(name)
        new = [counter, graph.call_function(aten.add_.Tensor, (counter, 1))]
        if norm.meta.get(CUMULATIVE):
            new.append(graph.call_function(cumulative_average_factor, (new[-1],)))
            set_argument(norm, "momentum", new[-1])
    for n in new:
        n.meta[TRACKING] = True
