"""From what a loader gives to what a model takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.utils._pytree as pytree
from torch.fx import GraphModule

from quantflow.errors import QuantflowError
from quantflow.signature import Signature

# Picks the model's inputs out of a batch: returns a tensor, a tuple of positional or a dict of keyword inputs.
PickInputs = Callable[[Any], Any]


class Batch(NamedTuple):
    """One batch, taken apart: positional and keyword inputs of the model, and the target if there is one."""

    args: tuple
    kwargs: dict[str, Any]
    target: Any


def batches(
    data: Iterable[Any],
    graph: GraphModule,
    *,
    stage: str,
    inputs: PickInputs | None = None,
    device: torch.device | str | None = None,
) -> Iterator[Batch]:
    """The batches of ``data``, checked against what ``graph`` takes and moved to ``device``.

    Args:
        data: An iterable of batches: a tensor, a tuple or dict of inputs, or ``(inputs, target)``.
        graph: The captured graph that they are for.
        stage: The stage to name in errors.
        inputs: Picks the inputs where that is ambiguous.
        device: Where the tensors go.

    Raises:
        QuantflowError: at ``stage``, naming the batch, when it does not fit the graph.
    """
    signature = Signature.of_graph(graph)
    for index, batch in enumerate(taken_apart(data, signature, stage=stage, inputs=inputs)):
        try:
            signature.flatten(batch.args, batch.kwargs, stage=stage)
        except QuantflowError as error:
            where = f"batch {index}" + (f", input {error.node}" if error.node else "")
            raise QuantflowError(stage, error.reason, node=where, remedy=error.remedy) from None
        if device is not None:
            batch = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device, non_blocking=True), batch)
        yield batch


def taken_apart(
    data: Iterable[Any], signature: Signature, *, stage: str, inputs: PickInputs | None = None
) -> Iterator[Batch]:
    """The batches of ``data`` as inputs of what has ``signature``, and targets; nothing else is checked."""
    if isinstance(data, (torch.Tensor, str, bytes)) or not isinstance(data, Iterable):
        remedy = "pass a DataLoader or a list of batches, as [x]"
        raise QuantflowError(stage, f"{type(data).__name__} is no iterable of batches", node="data", remedy=remedy)
    for index, raw in enumerate(data):
        yield _take_apart(raw, signature, inputs, stage, index)


def _take_apart(raw: Any, signature: Signature, inputs: PickInputs | None, stage: str, index: int) -> Batch:
    positional, keyword = _expected(signature)
    if inputs is not None:
        picked = inputs(raw)
        target = raw[-1] if isinstance(raw, (tuple, list)) and len(raw) > 1 else None
        if isinstance(picked, Mapping):
            return Batch((), dict(picked), target)
        return Batch(tuple(picked) if isinstance(picked, (tuple, list)) else (picked,), {}, target)
    if isinstance(raw, Mapping):
        names = [i.name for i in signature.inputs]
        if len(names) == positional + len(keyword) and all(n in raw for n in (*names[:positional], *keyword)):
            by_position = tuple(raw[n] for n in names[:positional])
            return Batch(by_position, {n: raw[n] for n in keyword}, raw.get("labels"))
        return Batch((), {k: v for k, v in raw.items() if k in (*keyword, *names)}, raw.get("labels"))
    if isinstance(raw, torch.Tensor):
        return Batch((raw,), {}, None)
    if isinstance(raw, (tuple, list)):
        if len(raw) == 2 and isinstance(raw[0], Mapping):
            return Batch((), dict(raw[0]), raw[1])
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


def _expected(signature: Signature) -> tuple[int, list[str]]:
    """How many positional inputs, and which keyword inputs."""
    if signature.in_spec is None:
        return len(signature.inputs), []
    args, kwargs = signature.in_spec.children()
    return len(args.children()), list(kwargs.context or [])


def _describe(raw: Any) -> str:
    if isinstance(raw, (tuple, list)):
        return f"a {type(raw).__name__} of {len(raw)}: {', '.join(type(r).__name__ for r in raw)}"
    return f"a {type(raw).__name__}"
