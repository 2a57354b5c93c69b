"""Dropout stays an operator of its own while a model is captured in inference mode.

In inference mode dropout returns its input, the same tensor. The tracer tells values apart by tensor, so it takes every later
reader of that input for a reader of the dropout: ``x + f(dropout(x))`` would train as ``d + f(d)``. While capturing, dropout
therefore reads an alias of its input; the aliases are erased from the captured program.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from quantflow.aten import INFERENCE_IDENTITIES, aten, is_inplace, label, op
from quantflow.graph.modes import FROZEN
from quantflow.graph.regions import nodes_of

_DROPOUTS = INFERENCE_IDENTITIES - {aten.detach.default}
_FUNCTIONS = frozenset(
    {
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
        *(torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout),
    }
)
_INPLACE = 3  # the position of ``inplace`` in the functions that have it


@contextlib.contextmanager
def distinct_dropouts(model: nn.Module) -> Iterator[None]:
    """Let every dropout of ``model`` that is not in place read an alias of its input, for the time of a capture."""
    graphs = {m: _retarget(m) for m in model.modules() if isinstance(m, GraphModule)}
    try:
        with _AliasedDropouts():
            yield
    finally:
        for module, nodes in graphs.items():
            for node, target in nodes.items():
                node.target = target
            if nodes:
                module.recompile()


def erase_aliases(program: ExportedProgram) -> None:
    """Erase what :func:`distinct_dropouts` has left in ``program``, in place."""
    for module in program.graph_module.modules():
        if not isinstance(module, GraphModule):
            continue
        for node in module.graph.nodes:
            if op(node) not in _DROPOUTS or is_inplace(node):
                continue
            given = node.args[0]
            if given.target is aten.alias.default:
                node.replace_input_with(given, given.args[0])
                if not given.users:
                    module.graph.erase_node(given)
        module.recompile()


def freeze_ambiguous(program: ExportedProgram) -> tuple[str, ...]:
    """Keep in inference mode each dropout that several nodes of ``program`` read, a program captured elsewhere in inference
    mode: which of them read the dropout's input in truth can't be told.

    Returns:
        What to call those dropouts before a person.
    """
    unclear = [
        n for n in nodes_of(program.graph_module) if op(n) in _DROPOUTS and not is_inplace(n) and len(n.users) > 1
    ]
    for node in unclear:
        node.meta[FROZEN] = True
    return tuple(map(label, unclear))


class _AliasedDropouts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inplace = kwargs.get("inplace") or (len(args) > _INPLACE and args[_INPLACE])
        if func in _FUNCTIONS and not inplace:
            if args:
                args = (aten.alias.default(args[0]), *args[1:])
            else:
                kwargs = {**kwargs, "input": aten.alias.default(kwargs["input"])}
        return func(*args, **kwargs)


def _retarget(module: GraphModule) -> dict[Node, Any]:
    """Let the dropouts of a graph, which calls operators and no functions, read aliases; what they called before."""
    found = {n: n.target for n in module.graph.nodes if op(n) in _DROPOUTS and not is_inplace(n)}
    for node, target in found.items():
        node.target = _aliased(target)
    if found:
        module.recompile()
    return found


def _aliased(operator: Any) -> Any:
    def dropout(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return operator(aten.alias.default(x), *args, **kwargs)

    return dropout
