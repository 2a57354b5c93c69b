"""Construction of a network by statements. Each runs when it is added, which gives its shape and rejects it if it fails."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import nn

from fuzzing.network import PRELUDE, Input, Network, Statement

T = TypeVar("T")
_MOST_ELEMENTS = 20_000


class Unfit(Exception):  # noqa: N818  not an error: the operator does not fit the value
    """An operator can't be applied to a value."""


@dataclass(frozen=True)
class Operator:
    """An operator that can extend a network.

    Attributes:
        name: Its name in tables.
        add: Applies it in a builder to the value of a name; raises :class:`Unfit` if it does not fit.
        weight: The relative frequency with which it is drawn.
        ranks: The ranks of values that it accepts.
        kind: The kind of values that it accepts: ``float``, ``int`` or ``bool``.
    """

    name: str
    add: Callable[[Builder, str], None]
    weight: float
    ranks: tuple[int, ...]
    kind: str


OPERATORS: dict[str, Operator] = {}


def operator(weight: float = 1.0, ranks: Sequence[int] = (1, 2, 3, 4, 5), kind: str = "float") -> Callable[[T], T]:
    """Register the decorated function under its name."""

    def register(add: T) -> T:
        name = add.__name__  # type: ignore[attr-defined]
        OPERATORS[name] = Operator(name, add, weight, tuple(ranks), kind)  # type: ignore[arg-type]
        return add

    return register


@dataclass
class Builder:
    """A network under construction.

    Attributes:
        random: The generator of all choices.
        values: The value of each name so far.
    """

    seed: int
    random: random.Random
    values: dict[str, Any] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    layers: dict[str, str] = field(default_factory=dict)
    statements: list[Statement] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.names: dict[str, Any] = {}
        exec(PRELUDE, self.names)
        self.names["self"] = self.model = nn.Module().eval()

    # Choices

    def pick(self, *options: T) -> T:
        """One of ``options``."""
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random.random() < probability

    def number(self, low: float, high: float) -> float:
        """A random number with few digits."""
        return round(self.random.uniform(low, high), 2)

    # Values

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the value ``name``."""
        return tuple(self.values[name].shape)

    def alike(self, name: str) -> list[str]:
        """The other values with the shape and kind of ``name``."""
        x = self.values[name]
        return [n for n, v in self.values.items() if n != name and v.shape == x.shape and v.dtype == x.dtype]

    def others(self, fits: Callable[[torch.Tensor], bool]) -> list[str]:
        """The float values for which ``fits`` is true."""
        return [n for n, v in self.values.items() if v.is_floating_point() and fits(v)]

    # Construction

    def input(self, text: str, keyword: bool = False) -> str:
        """Add an input."""
        name = f"x{len(self.inputs)}"
        self.inputs.append(Input(name, text, keyword))
        self.values[name] = eval(text, self.names)
        return name

    def layer(self, kind: str, text: str) -> str:
        """Add a layer constructed by the expression ``text``; returns ``self.name``."""
        name = f"{kind}{len(self.layers)}"
        return self.lines(name, f"self.{name} = {text}")

    def parameter(self, text: str) -> str:
        """Add a parameter."""
        return self.layer("scale", f"nn.Parameter({text})")

    def buffer(self, text: str) -> str:
        """Add a buffer."""
        name = f"state{len(self.layers)}"
        return self.lines(name, f'self.register_buffer("{name}", {text})')

    def lines(self, name: str, text: str) -> str:
        """Add a layer constructed by lines of ``__init__``."""
        exec(text, self.names)
        self.layers[name] = text
        return f"self.{name}"

    def let(self, expression: str, prefix: str = "") -> str:
        """Add a value; ``prefix`` precedes the assignment, as ``with torch.no_grad():``."""
        name = f"v{sum(len(s.makes) for s in self.statements)}"
        indented = f"{prefix}\n    " if prefix else ""
        self._run(Statement(f"{indented}{name} = {expression}", (name,)), (name,))
        return name

    def let_all(self, expression: str, count: int) -> list[str]:
        """Add ``count`` values of one expression."""
        first = sum(len(s.makes) for s in self.statements)
        names = tuple(f"v{first + i}" for i in range(count))
        self._run(Statement(f"{', '.join(names)} = {expression}", names), names)
        return list(names)

    def do(self, text: str) -> None:
        """Add a statement that writes in place."""
        self._run(Statement(text), ())

    def _run(self, statement: Statement, names: tuple[str, ...]) -> None:
        space = {**self.names, **self.values}
        try:
            with torch.no_grad():
                exec(statement.text, space)
        except Exception as error:
            raise Unfit(str(error)) from error
        made = {name: space[name] for name in names}
        for tensor in made.values():
            if not isinstance(tensor, torch.Tensor) or not 0 < tensor.numel() <= _MOST_ELEMENTS or tensor.ndim > 6:
                raise Unfit("too large, too small, or no tensor")
            if tensor.is_floating_point() and not float(tensor.abs().max()) < 1e4:
                raise Unfit("too far from one")
        self.values.update(made)
        self.statements.append(statement)

    def attempt(self, chosen: Operator, name: str) -> bool:
        """Add an operator; if it does not fit, restore the previous state and return False."""
        kept = len(self.statements), dict(self.layers), dict(self.values)
        try:
            chosen.add(self, name)
        except Unfit:
            del self.statements[kept[0] :]
            self.layers, self.values = kept[1:]
            return False
        return True

    def network(self, outputs: Sequence[str], structure: str, channels_last: bool) -> Network:
        """The constructed network."""
        parts = tuple(self.inputs), self.layers, tuple(self.statements)
        return Network(self.seed, *parts, tuple(outputs), structure, channels_last)
