"""The operators that a delegate's compiler was compiling when it raised an error."""

from __future__ import annotations

import traceback

from torch.export import ExportedProgram
from torch.fx import Node

from quantflow.delegates.delegation import computes


def being_compiled(error: BaseException) -> list[Node]:
    """Return the operators of the program that a delegate's ``preprocess`` compiled when it raised ``error`` or its cause.

    executorch's own message may name none of them. The list is empty for an error that no delegate raised.
    """
    link: BaseException | None = error
    while link is not None:
        for frame, _ in traceback.walk_tb(link.__traceback__):
            code = frame.f_code
            given = (
                frame.f_locals.get(code.co_varnames[0]) if code.co_name == "preprocess" and code.co_argcount else None
            )
            if isinstance(given, ExportedProgram):
                return [node for node in given.graph.nodes if computes(node)]
        link = link.__cause__ or link.__context__
    return []
