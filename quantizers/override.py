"""Exceptions to a quantizer's scheme: which layers, and what instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn
from torch.fx import Node

from quantizers.scheme import Scheme

Where = str | type[nn.Module] | Callable[[Node], bool]
Overrides = Mapping[Where, Scheme | None] | Iterable[tuple[Where, Scheme | None]]


@dataclass(frozen=True)
class Override:
    """A scheme for some layers.

    Attributes:
        where: The dotted name of a layer (it and all below it; ``*`` matches), a module type, or a predicate on nodes.
        scheme: What to use there; None leaves the layers in float.
    """

    where: Where
    scheme: Scheme | None

    def matches(self, node: Node) -> bool:
        """Whether ``node`` was traced from one of these layers."""
        if isinstance(self.where, type):
            wanted = f"{self.where.__module__}.{self.where.__qualname__}"
            return any(kind == wanted for _, kind in _layers(node))
        if isinstance(self.where, str):
            return any(fnmatchcase(name, self.where) for name, _ in _layers(node))
        return bool(self.where(node))

    def __str__(self) -> str:
        return getattr(self.where, "__name__", str(self.where))


def overrides_from(given: Overrides) -> tuple[Override, ...]:
    """``given`` as overrides; a later one wins over an earlier one."""
    pairs = given.items() if isinstance(given, Mapping) else given
    return tuple(Override(where, scheme) for where, scheme in pairs)


def _layers(node: Node) -> Iterator[tuple[str, str]]:
    """The names and qualified types of the modules that ``node`` was traced from, outermost first."""
    for name, kind in (node.meta.get("nn_module_stack") or {}).values():
        # A module called again is recorded as "name@1".
        yield (
            re.sub(r"@\d+$", "", name),
            f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind),
        )
