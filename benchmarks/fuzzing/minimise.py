"""Reduction of a failing network to a small one with the same failure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from fuzzing.network import PRELUDE, Input, Network


def minimised(network: Network, fails: Callable[[Network], bool], tries: int = 80) -> Network:
    """The smallest network found that ``fails``, by removing outputs, statements, inputs and the predecessors of values.

    Args:
        network: A failing network.
        fails: Whether a network has the same failure.
        tries: The largest number of calls of ``fails``.
    """
    found, asked = network, 0
    while asked < tries:
        for smaller in _smaller(found):
            if smaller == found:
                continue
            asked += 1
            if fails(smaller):
                found = smaller
                break
            if asked >= tries:
                break
        else:
            return found
    return found


def _smaller(network: Network) -> Iterator[Network]:
    """Reduced networks, the smallest first."""
    if network.structure != "one" or len(network.outputs) > 1:
        for name in network.outputs:
            yield replace(network, outputs=(name,), structure="one").pruned()
    yield network.pruned()
    if network.channels_last:
        inputs = tuple(
            replace(i, text=i.text.replace(".to(memory_format=torch.channels_last)", "")) for i in network.inputs
        )
        yield replace(network, inputs=inputs, channels_last=False)
    values = _values(network)
    names = [name for s in network.statements for name in s.makes if name in values]
    for name in reversed(names):  # replace the predecessors of a value by an input
        if network.structure == "one" and name in network.outputs:
            continue
        yield _from(network, name, values[name])
    if network.structure == "one":
        for name in names:  # remove the successors of a value
            if name not in network.outputs:
                yield replace(network, outputs=(name,)).pruned()
    for index in reversed(range(len(network.statements))):
        yield from _bypassed(network, index, values)


def _from(network: Network, name: str, value: torch.Tensor) -> Network:
    """``network`` with an input in place of ``name`` and of the statements that only it needs."""
    index = next(i for i, s in enumerate(network.statements) if name in s.makes)
    shape = ", ".join(map(str, value.shape))
    text = f"torch.randn({shape})" if value.is_floating_point() else f"torch.randint(0, 2, ({shape},))"
    text = f"{text}.bool()" if value.dtype == torch.bool else text
    new = f"x{1 + max(int(i.name[1:]) for i in network.inputs)}"
    kept = network.without([index])
    statements = tuple(replace(s, text=_renamed(s.text, name, new)) for s in kept.statements)
    outputs = tuple(new if o == name else o for o in kept.outputs)
    return replace(kept, statements=statements, outputs=outputs, inputs=(Input(new, text), *kept.inputs)).pruned()


def _bypassed(network: Network, index: int, values: dict[str, torch.Tensor]) -> Iterator[Network]:
    """Networks without a statement, whose readers read one of its operands of the same shape."""
    statement = network.statements[index]
    less = network.without([index])
    if not statement.makes:
        yield less.pruned()
        return
    if len(statement.makes) > 1 or statement.makes[0] not in values:
        return
    made = statement.makes[0]
    for name in sorted(statement.reads):
        like = values.get(name)
        if like is None or like.shape != values[made].shape or like.dtype != values[made].dtype:
            continue
        statements = tuple(replace(s, text=_renamed(s.text, made, name)) for s in less.statements)
        outputs = tuple(name if o == made else o for o in less.outputs)
        yield replace(less, statements=statements, outputs=outputs).pruned()


def _renamed(text: str, old: str, new: str) -> str:
    return re.sub(rf"\b{old}\b", new, text)


def _values(network: Network) -> dict[str, torch.Tensor]:
    """The value of each name in inference."""
    space: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        exec(PRELUDE, space)
        model, ((args, kwargs),) = network.build(batches=1)
        named = [i.name for i in network.inputs if not i.keyword]
        values = {**dict(zip(named, args, strict=True)), **kwargs}
        space["self"] = model
        for statement in network.statements:
            run = {**space, **values}
            exec(statement.text, run)
            values |= {name: run[name] for name in statement.makes}
    return values
