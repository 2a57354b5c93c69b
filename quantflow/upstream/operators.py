"""Classes, schemas and names of operators.

Names: ``torch._ops.OpOverload``, ``HigherOrderOperator`` and ``OperatorBase``; ``_schema``, ``_name``, ``_opname`` and
``_overloadname`` of an operator, which executorch's edge operators have too. The graph is read by them: an argument by its name
in the schema, an operator by its name. ``torch._C`` is the module of builtins that name no module of their own. There is no
fall-back.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

from typing import Any

from torch._ops import HigherOrderOperator, OperatorBase, OpOverload

__all__ = [
    "BUILTINS",
    "HigherOrderOperator",
    "OpOverload",
    "OperatorBase",
    "overload_name",
    "packet_name",
    "qualified_name",
    "schema_of",
]

BUILTINS = "torch._C"


def schema_of(target: object) -> Any:
    """Return the schema of an operator (a ``torch.FunctionSchema``); None if ``target`` has none."""
    return getattr(target, "_schema", None)


def packet_name(target: object) -> str:
    """Return ``"conv2d"`` for ``aten.conv2d.default``; ``""`` if ``target`` is no operator."""
    return getattr(target, "_opname", None) or ""


def overload_name(target: OpOverload) -> str:
    """Return ``"default"`` for ``aten.conv2d.default``."""
    return target._overloadname


def qualified_name(target: object) -> str:
    """Return ``"aten::add.Tensor"`` for ``aten.add.Tensor``; ``""`` if ``target`` is no operator."""
    return getattr(target, "_name", None) or ""
