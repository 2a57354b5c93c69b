"""Detection of the nodes of a capture in inference mode that follow the training mode of the model."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from quantflow.graph import modes
from quantflow.graph.aten import argument, has_argument, label, layer, op
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.graph.inference_mode import same_values, set_mode
from quantflow.graph.regions import is_inlined, nodes_beyond, nodes_of, switches
from quantflow.upstream.modules import NormBase, own_buffers, own_parameters


def mark_modes(model: nn.Module, program: ExportedProgram, capture: Callable[[], ExportedProgram]) -> tuple[str, ...]:
    """Record on each node of ``program``, the capture of ``model`` in inference mode, whether it follows the mode.

    A layer of torch.nn uses its own mode while the model trains. The mode of a call in another class can come from anywhere. If
    there is such a call, the model is captured again in training mode, and the calls of both captures are compared.

    Args:
        model: The model, in inference mode. Its mode does not change.
        program: The capture of the model. Its nodes are changed in place.
        capture: A function that captures the model in its current mode.

    Returns:
        Names for messages: of the nodes whose mode is unknown, which follow the mode, and of the layers whose own ``train()``
        changes their attributes or tensors.
    """
    nodes = modes.with_mode(nodes_of(program.graph_module))
    if isinstance(model, TrainableGraphModule):
        matches = _matches(nodes, modes.with_mode(nodes_of(model)))
        for node in nodes:
            known = matches[node].meta if node in matches else {}
            modes.mark(node, follows=modes.FROZEN not in known, cumulative=modes.CUMULATIVE in known)
        return _unclear(n for n in nodes if n not in matches)
    layers = dict(model.named_modules(remove_duplicate=False))
    before = {name: _copied(_held(m)) for name, m in layers.items() if type(m).train is not nn.Module.train}
    set_mode(model, True)
    changed = [f"{k} ({type(layers[k]).__name__})".lstrip() for k in before if not _holds(layers[k], before[k])]
    trains = {name for name, m in layers.items() if m.training}
    cumulative = {name for name, m in layers.items() if _is_cumulative(m)}
    own = not any(isinstance(m, GraphModule) for m in layers.values())
    in_doubt = {n for n in nodes if not (modes.is_training(n) or (own and _is_stock(layers.get(layer(n)))))}
    matches = {}
    if in_doubt:
        with contextlib.suppress(Exception), _left_alone(model), _momentum_given([layers[n] for n in cumulative]):
            matches = _matches(nodes, modes.with_mode(nodes_of(capture().graph_module)))
    set_mode(model, False)
    for node in nodes:
        follows = modes.is_training(matches[node]) if node in matches else node in in_doubt or layer(node) in trains
        modes.mark(node, follows=follows, cumulative=layer(node) in cumulative)
    return (*changed, *_unclear(n for n in nodes if n in in_doubt and n not in matches))


def freeze_unswitched(program: ExportedProgram) -> tuple[str, ...]:
    """Freeze the nodes that follow the mode in regions of ``program`` that can't change their mode.

    Returns:
        The names of those nodes for messages.
    """
    whole = program.graph_module
    kept = [node for node in nodes_beyond(whole, switches) if modes.SWITCHED in node.meta]
    kept += [node for node in nodes_beyond(whole, is_inlined) if modes.CUMULATIVE in node.meta and node not in kept]
    for node in kept:
        del node.meta[modes.SWITCHED]
        node.meta[modes.FROZEN] = True
    return tuple(f"{label(node)} in a region of its own" for node in kept)


def _matches(nodes: list[Node], others: list[Node]) -> dict[Node, Node]:
    """The matching calls of another capture: by order if all calls are equal, else by order within a layer."""
    if list(map(_call, nodes)) == list(map(_call, others)):
        return dict(zip(nodes, others, strict=True))
    pairs: dict[Node, Node] = {}
    theirs = _by_layer(others)
    for of, mine in _by_layer(nodes).items():
        if list(map(_call, mine)) == list(map(_call, theirs[of])):
            pairs.update(zip(mine, theirs[of], strict=True))
    return pairs


def _call(node: Node) -> tuple:
    return op(node), argument(node, "p") if has_argument(node, "p") else None


def _by_layer(nodes: Iterable[Node]) -> defaultdict[tuple, list[Node]]:
    calls: defaultdict[tuple, list[Node]] = defaultdict(list)
    for node in nodes:
        calls[layer(node), op(node)].append(node)
    return calls


def _unclear(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(f"{label(node)} in an unknown mode" for node in nodes)


def _held(module: nn.Module) -> tuple[dict, list[torch.Tensor]]:
    """The numbers and strings of ``module`` by name, without its mode, and its tensors."""
    plain = {k: v for k, v in vars(module).items() if k != "training" and isinstance(v, (bool, int, float, str))}
    tensors = [*own_parameters(module).values(), *own_buffers(module).values()]
    return plain, [tensor.detach() for tensor in tensors if tensor is not None]


def _copied(held: tuple[dict, list[torch.Tensor]]) -> tuple[dict, list[torch.Tensor]]:
    return held[0], [tensor.clone() for tensor in held[1]]


def _holds(module: nn.Module, before: tuple[dict, list[torch.Tensor]]) -> bool:
    """Whether the numbers, strings and tensors of ``module`` are equal to ``before``."""
    plain, tensors = _held(module)
    return plain == before[0] and len(tensors) == len(before[1]) and all(map(same_values, tensors, before[1]))


def _is_stock(module: nn.Module | None) -> bool:
    """Whether ``module`` has the ``forward`` of a torch.nn class, which trains if and only if its own mode is training."""
    if module is None or "forward" in vars(module):
        return False
    return str(getattr(type(module).forward, "__module__", "")).startswith("torch.nn.modules.")


def _is_cumulative(module: nn.Module) -> bool:
    """Whether ``module`` is a batch norm with ``momentum=None``, which an inference trace does not show."""
    norm = isinstance(module, NormBase)
    return norm and module.momentum is None and module.track_running_stats


@contextlib.contextmanager
def _left_alone(model: nn.Module) -> Iterator[None]:
    """Restore the attributes of all modules of ``model`` afterwards: a capture in training mode may store fake tensors."""
    before = [(held, dict(held)) for m in model.modules() for held in (vars(m), own_buffers(m), own_parameters(m))]
    try:
        yield
    finally:
        for held, then in before:
            held.clear()
            held.update(then)


@contextlib.contextmanager
def _momentum_given(norms: list[NormBase]) -> Iterator[None]:
    """Replace ``momentum=None`` by a number within the context, because a cumulative average can't be captured."""
    for norm in norms:
        norm.momentum = 0.1
    try:
        yield
    finally:
        for norm in norms:
            norm.momentum = None
