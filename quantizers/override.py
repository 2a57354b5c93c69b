"""Overrides: schemes for single layers in place of the quantizer's scheme."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.fx import Node

from quantizers.scheme import Scheme

Where = str | type[nn.Module] | Callable[[Node], bool]
Overrides = Mapping[Where, Scheme | None] | Iterable[tuple[Where, Scheme | None]]


@dataclass(frozen=True)
class Override:
    """A scheme for some layers, instead of the quantizer's own.

    Attributes:
        where: The dotted name of a layer (it and all below it; ``*`` matches), a module type, or a predicate on nodes.
        scheme: The scheme of these layers; None leaves them in float.

    Example:
        >>> import torch
        >>> from quantizers import W4A8, XNNPACKQuantizer
        >>> quantizer = XNNPACKQuantizer(overrides={"0": None, torch.nn.Linear: W4A8})
        >>> [(str(override), str(override.scheme)) for override in quantizer.overrides]
        [('0', 'None'), ('Linear', 'w4a8')]
    """

    where: Where
    scheme: Scheme | None

    def matches(self, node: Node) -> bool:
        """Tell whether a node was traced from one of these layers.

        Args:
            node: A node of a captured graph.

        Returns:
            True where it was.
        """
        if isinstance(self.where, type):
            wanted = f"{self.where.__module__}.{self.where.__qualname__}"
            return any(kind == wanted for _, kind in _layers(node))
        if isinstance(self.where, str):
            return any(fnmatchcase(name, self.where) for name, _ in _layers(node))
        return bool(self.where(node))

    def __str__(self) -> str:
        return getattr(self.where, "__name__", str(self.where))


_GIVEN = "quantflow_override"  # in node.meta: the override of the node that this one replaced, None for none


def remember_override(node: Node, override: Override | None) -> None:
    """Let ``override``, that of a node that ``node`` replaces, hold for it as well."""
    node.meta[_GIVEN] = override


def override_for(node: Node, overrides: Sequence[Override]) -> Override | None:
    """Return the last of ``overrides`` that matches ``node`` or the node that it replaced; None for none."""
    if _GIVEN in node.meta:
        return node.meta[_GIVEN]
    return next((override for override in reversed(overrides) if override.matches(node)), None)


def overrides_from(given: Overrides) -> tuple[Override, ...]:
    """``given`` as overrides; later overrides take precedence."""
    pairs = given.items() if isinstance(given, Mapping) else given
    return tuple(Override(where, scheme) for where, scheme in pairs)


def _layers(node: Node) -> Iterator[tuple[str, str]]:
    """The names and qualified types of the modules that ``node`` was traced from, from the outermost to the innermost."""
    for name, kind in (node.meta.get("nn_module_stack") or {}).values():
        # torch records a second call of a module as "name@1".
        yield (
            re.sub(r"@\d+$", "", name),
            f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind),
        )
