"""The dynamic shapes that make dimension 0 of every tensor input one batch dimension."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from quantflow.errors import QuantflowError
from quantflow.upstream import pytree


def with_dynamic_batch(
    model: nn.Module, args: tuple, kwargs: dict[str, Any], bound: bool | int, given: Any = None
) -> tuple[tuple, dict[str, Any], dict[str, Any]]:
    """Return the example inputs, with a batch of one doubled, and the dynamic shapes that make dimension 0 the batch.

    Args:
        model: The model, whose ``forward`` names the inputs.
        args: The example inputs.
        kwargs: The keyword inputs.
        bound: The largest batch, or True for none.
        given: The dynamic shapes of other dimensions, as in ``torch.export``. Where they give dimension 0 a size, they win.

    Raises:
        QuantflowError: at stage ``"export"``.
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.ndim]
    if not tensors:
        raise QuantflowError("export", "no input has a batch dimension", node="args", remedy="drop dynamic_batch")
    batch = tensors[0].shape[0]
    if bound is not True and int(bound) < 2:
        reason, remedy = f"a batch of at most {bound} does not vary", "drop dynamic_batch, or give the largest batch"
        raise QuantflowError("export", reason, node="dynamic_batch", remedy=remedy)
    try:
        named = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise QuantflowError("export", f"forward does not take these inputs: {error}", node="args") from error
    told: dict[int, Any] = {}  # what is given for each tensor, by the order of tensors
    if given is not None:
        _tell(named if isinstance(given, Mapping) else list(named.values()), given, told)
    taken = {getattr(size, "__name__", "") for own in told.values() for size in own.values()}
    name = "rows" if "batch" in taken else "batch"
    dim = Dim(name, min=1) if bound is True else Dim(name, min=1, max=int(bound))
    order = {id(leaf): index for index, leaf in enumerate(pytree.tree_leaves(named))}

    def shape(leaf: object) -> dict[int, Any] | None:
        return told.get(order[id(leaf)])

    def batched(leaf: object) -> bool:
        shaped = isinstance(leaf, torch.Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch
        return shaped and 0 not in (shape(leaf) or {})

    def widen(leaf: object) -> object:
        # The tracer treats a size of one as a constant, so the example gets two rows.
        return torch.cat([leaf, leaf]) if batch == 1 and isinstance(leaf, torch.Tensor) and batched(leaf) else leaf

    def dims(leaf: object) -> object:
        own = shape(leaf)
        return {0: dim, **(own or {})} if batched(leaf) else own

    dynamic_shapes = {name: pytree.tree_map(dims, value) for name, value in named.items()}
    return pytree.tree_map(widen, args), pytree.tree_map(widen, kwargs), dynamic_shapes


def _tell(inputs: Any, given: Any, told: dict[int, Any], start: int = 0) -> int:
    """Note in ``told`` what ``given`` says of each tensor in ``inputs``; return the index behind the last leaf."""
    leaves = len(pytree.tree_leaves(inputs))
    if given is None:
        return start + leaves
    if isinstance(inputs, torch.Tensor):
        if not isinstance(given, (Mapping, list, tuple)):
            reason = f"{given!r} is not the sizes of a tensor"
            raise QuantflowError(
                "export", reason, node="dynamic_shapes", remedy="{dimension: Dim(...)} for each tensor"
            )
        sizes = given.items() if isinstance(given, Mapping) else enumerate(given)
        told[start] = {position: size for position, size in sizes if size is not None}
        return start + 1
    if isinstance(inputs, Mapping) and isinstance(given, Mapping) and given.keys() <= inputs.keys():
        for name, value in inputs.items():
            start = _tell(value, given.get(name), told, start)
        return start
    if isinstance(inputs, (list, tuple)) and isinstance(given, (list, tuple)) and len(inputs) == len(given):
        for value, shapes in zip(inputs, given, strict=True):
            start = _tell(value, shapes, told, start)
        return start
    reason = f"dynamic_shapes have another structure than the inputs: {given!r} for {_kind(inputs)}"
    remedy = "one entry for each input, None for static"
    raise QuantflowError("export", reason, node="dynamic_shapes", remedy=remedy)


def _kind(inputs: Any) -> str:
    if isinstance(inputs, Mapping):
        return f"inputs named {', '.join(inputs)}"
    return f"{len(inputs)} inputs" if isinstance(inputs, (list, tuple)) else type(inputs).__name__
