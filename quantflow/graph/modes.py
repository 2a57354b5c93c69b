"""Training and inference mode of a captured graph, switched on its nodes.

Export writes the mode of each layer into its call as a literal (``aten.dropout(x, 0.2, False)``). Backend quantizers match
those nodes, so the mode is changed on the node itself and nothing is swapped for a module. A graph is captured in
inference mode; what is a training literal even then (Monte Carlo dropout, batch norm without running statistics) is the
model's own choice in both modes and is left alone.
"""

from __future__ import annotations

from collections.abc import Set

import torch
from torch.fx import GraphModule, Node

from quantflow.aten import argument, aten, layer, op, set_argument

BATCH_NORM = aten.batch_norm.default

# The argument that holds the mode.
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

SWITCHED = "quantflow_switched"  # node.meta: this node follows the module's mode
FROZEN = "quantflow_frozen"  # node.meta: the model's own train() leaves this node in inference mode
CUMULATIVE = "quantflow_cumulative_average"  # node.meta: batch norm with momentum=None
TRACKING = "quantflow_tracking"  # node.meta: counts batches, there in training mode only


def cumulative_average_factor(num_batches_tracked: torch.Tensor) -> float:
    """The momentum of a batch norm whose ``momentum`` is None: the cumulative moving average."""
    return 1.0 / float(num_batches_tracked)


def mark_switched(graph: torch.fx.Graph, never_trained: Set[str] = frozenset()) -> None:
    """Note on each node whether it follows the mode; ``graph`` is in inference mode.

    Args:
        graph: The graph, changed in place.
        never_trained: Names of layers that stay in inference mode.
    """
    for node in graph.nodes:
        name = _MODE_ARGUMENT.get(op(node))
        if name is None or argument(node, name):
            continue
        if layer(node) in never_trained:
            node.meta[FROZEN] = True
        if not node.meta.get(FROZEN):
            node.meta[SWITCHED] = name


def mark_frozen(graph: torch.fx.Graph) -> None:
    """Note on each node that stands in inference mode that it stays there; ``graph`` was captured in training mode."""
    for node in graph.nodes:
        if (name := _MODE_ARGUMENT.get(op(node))) is not None and not argument(node, name):
            node.meta[FROZEN] = True


def is_inference_constant(node: Node) -> bool:
    """Whether the operator ``node``, which has a mode, is in inference mode whenever the graph is."""
    return SWITCHED in node.meta or FROZEN in node.meta


def training_literals(graph: torch.fx.Graph) -> list[Node]:
    """The nodes that stand in training mode and could stand in inference mode."""
    nodes = [n for n in graph.nodes if op(n) in _MODE_ARGUMENT and argument(n, _MODE_ARGUMENT[op(n)])]
    return [n for n in nodes if op(n) not in _WITH_STATISTICS or argument(n, "running_mean") is not None]


def mark_all(graph: torch.fx.Graph) -> None:
    """Let every node that could follow the mode follow it; ``graph`` was captured in training mode."""
    for node in training_literals(graph):
        node.meta[SWITCHED] = _MODE_ARGUMENT[op(node)]


def strip_tracking(graph: torch.fx.Graph) -> None:
    """Erase the batch counters that a capture in training mode has written into ``graph``."""
    for node in list(graph.nodes):
        if op(node) is aten.add.Tensor and node.target is not aten.add.Tensor and not node.users:
            counter = node.args[0]
            if counter.op == "get_attr" and counter.target.endswith("num_batches_tracked"):
                graph.erase_node(node)


def switch(module: GraphModule, training: bool, *, batch_norm: bool) -> None:
    """Set the mode of every switched node of ``module``; with ``batch_norm`` False, batch norm stays in inference mode
    (frozen statistics) whatever ``training`` says. The caller recompiles.
    """
    graph = module.graph
    _untrack(graph)
    buffers = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for node in list(graph.nodes):
        name = node.meta.get(SWITCHED)
        if name is None:
            continue
        on = training and (batch_norm or op(node) is not BATCH_NORM)
        set_argument(node, name, on)
        if on and op(node) is BATCH_NORM:
            _track(node, buffers)


def _untrack(graph: torch.fx.Graph) -> None:
    """Erase what :func:`_track` has written."""
    for node in graph.nodes:
        if node.meta.get(CUMULATIVE):
            set_argument(node, "momentum", 0.0)
    for node in reversed(graph.nodes):
        if node.meta.get(TRACKING):
            graph.erase_node(node)


def _track(node: Node, buffers: set[str]) -> None:
    """Count batches before the batch norm ``node``, as the eager layer does in training mode."""
    running_mean = argument(node, "running_mean")
    name = str(running_mean.target).removesuffix("running_mean") + "num_batches_tracked"
    if name not in buffers:
        return
    graph = node.graph
    with graph.inserting_before(node):
        counter = graph.get_attr(name)
        new = [counter, graph.call_function(aten.add_.Tensor, (counter, 1))]
        if node.meta.get(CUMULATIVE):
            new.append(graph.call_function(cumulative_average_factor, (new[-1],)))
            set_argument(node, "momentum", new[-1])
    for n in new:
        n.meta[TRACKING] = True
