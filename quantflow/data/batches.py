"""Conversion of the batches of a data loader to model inputs and targets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from numbers import Integral
from typing import Any, NamedTuple, cast

import torch
from torch.fx import GraphModule

from quantflow.data.call_sequence import CallSequence
from quantflow.errors import QuantflowError
from quantflow.graph.own_state import OwnState
from quantflow.signature.signature import Signature
from quantflow.upstream import pytree

# Extracts the model's inputs from a batch: a tensor, a tuple of positional inputs or a dict of keyword inputs.
PickInputs = Callable[[Any], Any]


class Batch(NamedTuple):
    """One batch: the positional and keyword inputs of the model, the target if there is one, and whether it is the first of a
    :class:`CallSequence`.
    """

    args: tuple
    kwargs: dict[str, Any]
    target: Any
    begins: bool = False


def batches(
    data: Iterable[object],
    graph: GraphModule,
    *,
    stage: str,
    inputs: PickInputs | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """The batches of ``data``, checked against the signature of ``graph`` and moved to ``device``.

    Before the first batch of a :class:`CallSequence`, the state of ``graph`` becomes what it was at first.

    Args:
        data: An iterable of batches: a tensor, a tuple or dict of inputs, ``(inputs, target)``, or a sequence of these.
        graph: The captured graph that receives the inputs.
        stage: The stage to name in errors.
        inputs: Extracts the inputs of a batch if its structure is ambiguous.
        device: The device of the yielded tensors.

    Raises:
        QuantflowError: at ``stage``, naming the batch that does not fit the graph.
    """
    signature, first = Signature.of_graph(graph), OwnState(graph)
    for index, batch in enumerate(taken_apart(data, signature, stage=stage, inputs=inputs)):
        try:
            signature.flatten(batch.args, batch.kwargs, stage=stage)
        except QuantflowError as error:
            where = f"batch {index}" + (f", input {error.node}" if error.node else "")
            raise QuantflowError(stage, error.reason, node=where, remedy=error.remedy) from None
        if batch.begins:
            first.put_back()
        if device is not None:
            batch = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), batch)
        yield batch


def count_of(data: Iterable[object], most: int | None = None, *, stage: str) -> int | None:
    """The number of batches of ``data``, at most ``most``; ``most`` if the length is unknown.

    Raises:
        QuantflowError: at ``stage``, if ``most`` is not a positive integer.
    """
    if most is not None and (not isinstance(most, Integral) or most < 1):
        raise QuantflowError(
            stage, f"{most} batches show nothing", node="max_batches", remedy="1 or more, None for all"
        )
    try:
        count = len(cast(Sized, data))
        if isinstance(data, (list, tuple)):
            count = sum(len(item) if isinstance(item, CallSequence) else 1 for item in data)
    except TypeError:  # len of a DataLoader over an IterableDataset without a length raises
        return most
    return count if most is None else min(most, count)


def taken_apart(
    data: Iterable[object], signature: Signature, *, stage: str, inputs: PickInputs | None = None
) -> Iterator[Batch]:
    """The batches of ``data``, split into inputs by ``signature`` and targets, without further checks."""
    if isinstance(data, (torch.Tensor, str, bytes)) or not isinstance(data, Iterable):
        remedy = "pass a DataLoader or a list of batches, as [x]"
        raise QuantflowError(stage, f"{type(data).__name__} is no iterable of batches", node="data", remedy=remedy)
    index = 0
    for item in data:
        for place, raw in enumerate(item if isinstance(item, CallSequence) else (item,)):
            begins = isinstance(item, CallSequence) and not place
            yield _take_apart(raw, signature, inputs, stage, index)._replace(begins=begins)
            index += 1


def _take_apart(raw: Any, signature: Signature, inputs: PickInputs | None, stage: str, index: int) -> Batch:
    if inputs is not None:
        picked = inputs(raw)
        target = _left(raw, picked)
        if isinstance(picked, Mapping):
            return Batch(*(_by_name(picked, signature) or ((), dict(picked))), target)
        return Batch(tuple(picked) if isinstance(picked, (tuple, list)) else (picked,), {}, target)
    if isinstance(raw, torch.Tensor):
        return Batch((raw,), {}, None)
    fitting = next((batch for batch in _readings(raw) if _fits(batch, signature)), None)
    if fitting is not None:
        return fitting
    positional, keyword = _expected(signature)
    if isinstance(raw, Mapping):
        known = (*keyword, *(i.name for i in signature.inputs))
        named = _by_name(raw, signature) or ((), {k: v for k, v in raw.items() if k in known})
        return Batch(*named, raw.get("labels"))
    if isinstance(raw, (tuple, list)):
        if len(raw) == 2 and isinstance(raw[0], Mapping):
            return Batch(*(_by_name(raw[0], signature) or ((), dict(raw[0]))), raw[1])
        if len(raw) == 2 and isinstance(raw[0], (tuple, list)):
            return Batch(tuple(raw[0]), {}, raw[1])
        if len(raw) == positional and not keyword:
            return Batch(tuple(raw), {}, None)
        if len(raw) == positional + 1:
            return Batch(tuple(raw[:-1]), {}, raw[-1])
    if type(raw).__module__ == "numpy":
        raise QuantflowError(stage, "a numpy array", node=f"batch {index}", remedy="torch.from_numpy(batch)")
    raise QuantflowError(
        stage,
        f"can't tell the inputs of {_describe(raw)}; the model takes {signature.describe_inputs()}",
        node=f"batch {index}",
        remedy="pass inputs=lambda batch: ... that picks them",
    )


def _by_name(given: Mapping[str, object], signature: Signature) -> tuple[tuple, dict[str, Any]] | None:
    """Positional and keyword inputs from ``given``; None if one is missing or is a nested structure."""
    positional, keyword = _expected(signature)
    names = [i.name for i in signature.inputs]
    if len(names) != positional + len(keyword) or not all(n in given for n in (*names[:positional], *keyword)):
        return None
    return tuple(given[n] for n in names[:positional]), {n: given[n] for n in keyword}


def _readings(raw: Any) -> Iterator[Batch]:
    """The possible ways to split a batch into inputs and target; inputs alone come first."""
    if isinstance(raw, (tuple, list)):
        yield Batch(tuple(raw), {}, None)
    if isinstance(raw, (tuple, list, Mapping)):
        yield Batch((raw,), {}, None)
    if isinstance(raw, (tuple, list)) and raw:
        yield Batch(tuple(raw[:-1]), {}, raw[-1])
        if len(raw) == 2 and isinstance(raw[0], (tuple, list)):
            yield Batch(tuple(raw[0]), {}, raw[1])


def _fits(batch: Batch, signature: Signature) -> bool:
    """Whether the inputs have the structure of the model's inputs; shapes are not compared."""
    if signature.in_spec is None:
        return len(batch.args) == len(signature.inputs) and all(isinstance(a, torch.Tensor) for a in batch.args)
    return pytree.tree_structure((batch.args, batch.kwargs)) == signature.in_spec


def _left(raw: object, picked: object) -> Any:
    """The target of a batch whose inputs were ``picked``: its labels, or its last element if that is not an input."""
    if isinstance(raw, Mapping):
        return raw.get("labels")
    if not isinstance(raw, (tuple, list)) or len(raw) < 2:
        return None
    inputs, every = pytree.tree_leaves(picked), pytree.tree_leaves(raw)
    for leaf in pytree.tree_leaves(raw[-1]):
        if sum(_same(leaf, other) for other in inputs) >= sum(_same(leaf, other) for other in every):
            return None
    # All leaves may have been picked and converted, which their shapes show.
    shapes = [[getattr(leaf, "shape", None) for leaf in leaves] for leaves in (inputs, every)]
    return None if shapes[0] == shapes[1] else raw[-1]


def _same(a: object, b: object) -> bool:
    """Whether both are the same object, or equal views of the same memory."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return a is b
    return a.dtype == b.dtype and a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _expected(signature: Signature) -> tuple[int, list[str]]:
    """The number of positional inputs and the names of the keyword inputs."""
    if signature.in_spec is None:
        return len(signature.inputs), []
    args, kwargs = signature.in_spec.children()
    return len(args.children()), list(kwargs.context or [])


def _describe(raw: object) -> str:
    if isinstance(raw, (tuple, list)):
        return f"a {type(raw).__name__} of {len(raw)}: {', '.join(type(r).__name__ for r in raw)}"
    return f"a {type(raw).__name__}"
