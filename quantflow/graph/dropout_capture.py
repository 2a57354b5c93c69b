"""Dropout stays an operator of its own while a model is captured in inference mode.

In inference mode dropout returns its input, the same tensor. The tracer tells values apart by tensor, so it takes every later
reader of that input for a reader of the dropout: ``x + f(dropout(x))`` would train as ``d + f(d)``. While capturing, dropout
therefore reads an alias of its input; the aliases are erased from the captured program.
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
        *(_DROPOUTS | _PACKETS),  # what graphs call
    }
)
_INPLACE = 3  # the position of ``inplace`` in the functions that have it


def erase_aliases(program: ExportedProgram) -> None:
    """Erase what :class:`DistinctDropouts` has left in ``program``, in place."""
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


class DistinctDropouts(TorchFunctionMode):
    """Let every dropout that is not in place read an alias of its input, for the time of a capture."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inplace = kwargs.get("inplace") or (len(args) > _INPLACE and args[_INPLACE])
        if func in _FUNCTIONS and not inplace:
            if args:
                args = (aten.alias.default(args[0]), *args[1:])
            else:
                kwargs = {**kwargs, "input": aten.alias.default(kwargs["input"])}
        return func(*args, **kwargs)
