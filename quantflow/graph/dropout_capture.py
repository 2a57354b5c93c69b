"""Capture of dropout in inference mode as an operator with its own output.

In inference mode dropout returns its input tensor. The tracer identifies values by tensor, so it makes every later reader of
that input a reader of the dropout: ``x + f(dropout(x))`` would train as ``d + f(d)``. During a capture, dropout therefore reads
an alias of its input. The aliases are erased from the captured program.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from quantflow.graph.aten import INFERENCE_IDENTITIES, aten, is_inplace, label, op
from quantflow.graph.modes import FROZEN
from quantflow.graph.regions import nodes_of

_DROPOUTS = INFERENCE_IDENTITIES - {aten.detach.default}
_PACKETS = frozenset(target.overloadpacket for target in _DROPOUTS)
_FUNCTIONS = frozenset(
    {
        *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout),
        *(torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout),
        *(_DROPOUTS | _PACKETS),  # the operators that graphs call
    }
)
_INPLACE = 3  # the position of ``inplace`` in the functions that have it


def erase_aliases(program: ExportedProgram) -> None:
    """Erase the aliases that :class:`DistinctDropouts` added to ``program``, in place."""
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
    """Freeze each dropout of ``program`` with several readers in inference mode.

    In a program captured elsewhere in inference mode, the graph does not show which of the readers read the dropout's input in
    the model.

    Returns:
        The names of those dropouts for messages.
    """
    unclear = [
        n for n in nodes_of(program.graph_module) if op(n) in _DROPOUTS and not is_inplace(n) and len(n.users) > 1
    ]
    for node in unclear:
        node.meta[FROZEN] = True
    return tuple(map(label, unclear))


class DistinctDropouts(TorchFunctionMode):
    """A context for a capture, in which every dropout that is not in place reads an alias of its input."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inplace = kwargs.get("inplace") or (len(args) > _INPLACE and args[_INPLACE])
        if func in _FUNCTIONS and not inplace:
            if args:
                args = (aten.alias.default(args[0]), *args[1:])
            else:
                kwargs = {**kwargs, "input": aten.alias.default(kwargs["input"])}
        return func(*args, **kwargs)
