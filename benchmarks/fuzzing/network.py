"""A network as source code: inputs, layers and statements, printed as a script and run from the same text."""

from __future__ import annotations

import itertools
import linecache
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

_NAMES = re.compile(r"\b[vx]\d+\b")
_LAYERS = re.compile(r"self\.(\w+)")
_counter = itertools.count()

PRELUDE = '''\
import torch
import torchvision
from torch import nn
from torch.nn import functional as F


def trained(layer):
    """Statistics and affine parameters as after training: no identity, some scales negative."""
    with torch.no_grad():
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.is_floating_point():
                draw = torch.rand_like(tensor) + 0.5 if name == "running_var" else torch.randn_like(tensor) * 0.3
                tensor.copy_(draw + (name == "weight"))
    return layer
'''


@dataclass(frozen=True)
class Statement:
    """Lines of ``forward``.

    Attributes:
        text: The source text; lines after the first contain their indentation.
        makes: The names that the lines assign.
    """

    text: str
    makes: tuple[str, ...] = ()

    @property
    def reads(self) -> frozenset[str]:
        """The names of the values that the lines read."""
        return frozenset(_NAMES.findall(self.text)) - frozenset(self.makes)


@dataclass(frozen=True)
class Input:
    """An input: its name, the expression that generates it, and whether it is a keyword input."""

    name: str
    text: str
    keyword: bool = False


@dataclass(frozen=True)
class Network:
    """A network that is a readable script.

    Attributes:
        seed: The seed of weights and inputs.
        inputs: The inputs in order, keyword inputs last.
        layers: The lines of ``__init__`` that construct each layer, by its name.
        statements: The lines of ``forward``.
        outputs: The names of the returned values.
        structure: ``one``, ``tuple``, ``list``, ``dict`` or ``nested``.
        channels_last: Whether model and images are in ``torch.channels_last``.
    """

    seed: int
    inputs: tuple[Input, ...]
    layers: dict[str, str] = field(default_factory=dict)
    statements: tuple[Statement, ...] = ()
    outputs: tuple[str, ...] = ()
    structure: str = "one"
    channels_last: bool = False

    def used_layers(self) -> dict[str, str]:
        """The layers that statements use, directly or through other layers, in the order of construction."""
        wanted = {name for s in self.statements for name in _LAYERS.findall(s.text)}
        for name in reversed(self.layers):
            if name in wanted:
                wanted |= set(_LAYERS.findall(self.layers[name]))
        return {name: text for name, text in self.layers.items() if name in wanted}

    def returned(self) -> str:
        """The expression that ``forward`` returns."""
        o = self.outputs
        if self.structure == "dict":
            return "{" + ", ".join(f'"{chr(97 + i)}": {name}' for i, name in enumerate(o)) + "}"
        if self.structure == "list":
            return f"[{', '.join(o)}]"
        if self.structure == "nested":
            return f'{{"first": {o[0]}, "rest": ({"".join(f"{name}, " for name in o[1:])})}}'
        return f"({o[0]},)" if self.structure == "tuple" and len(o) == 1 else ", ".join(o)

    def source(self) -> str:
        """The script: ``Net``, and ``inputs()``, which returns the positional and keyword inputs of one call."""
        first = [i.name for i in self.inputs if not i.keyword]
        named = [i.name for i in self.inputs if i.keyword]
        taken = ", ".join(["self", *first, *(["*", *named] if named else [])])
        layers = self.used_layers()
        made = [line for text in layers.values() for line in text.splitlines()]
        body = [line for s in self.statements for line in s.text.splitlines()]
        drawn = {i.name: i.text for i in self.inputs}
        layout = ".to(memory_format=torch.channels_last)" if self.channels_last else ""
        lines = [
            PRELUDE,
            "",
            "class Net(nn.Module):",
            *(
                [*_indented(["def __init__(self):"], 4), *_indented(["super().__init__()", *made], 8), ""]
                if made
                else []
            ),
            *_indented([f"def forward({taken}):"], 4),
            *_indented([*body, f"return {self.returned()}"], 8),
            "",
            "",
            "def inputs():",
            f"    args = ({''.join(f'{drawn[n]}, ' for n in first)})",
            f"    return args, {{{', '.join(f'{n!r}: {drawn[n]}' for n in named)}}}",
            "",
            "",
            f"torch.manual_seed({self.seed})",
            f"model = Net().eval(){layout}",
        ]
        return "\n".join(lines) + "\n"

    def build(self, batches: int = 3) -> tuple[nn.Module, list[tuple[tuple, dict[str, Any]]]]:
        """The model in inference mode, and the inputs of ``batches`` calls. Torch's random state is preserved."""
        filename = f"<fuzz {self.seed}.{next(_counter)}>"
        source = self.source()
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        space: dict[str, Any] = {"__name__": "fuzz"}
        with torch.random.fork_rng(devices=[]):
            exec(compile(source, filename, "exec"), space)
            return space["model"], [space["inputs"]() for _ in range(batches)]

    def without(self, dropped: Iterable[int]) -> Network:
        """This network without the statements of these indices."""
        gone = set(dropped)
        return replace(self, statements=tuple(s for i, s in enumerate(self.statements) if i not in gone))

    def pruned(self) -> Network:
        """This network without statements and inputs that no output depends on; in-place writes are kept."""
        wanted = set(self.outputs)
        kept: list[Statement] = []
        for statement in reversed(self.statements):
            if wanted & {*statement.makes} or not statement.makes:
                wanted |= statement.reads
                kept.append(statement)
        inputs = tuple(i for i in self.inputs if i.name in wanted) or self.inputs[:1]
        return replace(self, statements=tuple(reversed(kept)), inputs=inputs)


def _indented(lines: Iterable[str], by: int) -> list[str]:
    return [" " * by + line for line in lines]
