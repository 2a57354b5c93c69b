"""A safety check for serialized pytree specs of untrusted programs: a spec must not import any module."""

from __future__ import annotations

import json
from typing import Any

_FACTORIES = {"list", "dict", "int", "float", "set"}


def spec_is_plain(text: str) -> bool:
    """Whether reading ``text`` with ``torch.utils._pytree.treespec_loads`` imports no module by name.

    An enumeration key and a ``defaultdict`` factory import a module. Builtin factories are accepted.
    """
    try:
        _, spec = json.loads(text)
        return _plain(spec)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _plain(spec: dict[str, Any]) -> bool:
    context = spec["context"]
    if spec["type"] == "collections.defaultdict":
        factory = (context["default_factory_module"], context["default_factory_name"])
        if factory[0] != "builtins" or factory[1] not in _FACTORIES:
            return False
    return not _names_enumeration(_unwrapped(context)) and all(_plain(child) for child in spec["children_spec"])


def _unwrapped(context: object) -> object:
    """The decoded ``context``. A context is JSON inside JSON, and loading the inner JSON would create the enumerations."""
    if not isinstance(context, str):
        return context
    try:
        return json.loads(context)
    except ValueError:
        return context


def _names_enumeration(value: object) -> bool:
    if isinstance(value, dict):
        return "__enum__" in value or any(_names_enumeration(v) for v in value.values())
    return isinstance(value, list) and any(_names_enumeration(v) for v in value)
