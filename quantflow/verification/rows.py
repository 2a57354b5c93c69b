"""Calls in as many rows as a stage takes: batches cut for a program of a fixed batch size, and its outputs joined again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree

from quantflow.errors import QuantflowError
from quantflow.signature import DynamicDim, Signature

Call = Callable[[tuple, dict[str, Any]], Any]


def rows_of(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """How many examples the inputs hold: dimension 0 of every tensor; None where they differ in it."""
    sizes = {t.shape[0] if t.ndim else None for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
    return sizes.pop() if len(sizes) == 1 else None


def rows_taken(signature: Signature | None) -> tuple[int, bool] | None:
    """How many rows a call takes at most, and whether it takes exactly so many; None for any number."""
    if signature is None:
        return None
    sizes = {i.shape[0] for i in signature.inputs if i.dtype is not None and i.shape}
    if len(sizes) != 1:
        return None
    (size,) = sizes
    if not isinstance(size, DynamicDim):
        return size, True
    return None if size.max is None else (size.max, False)


def in_rows(call: Call, taken: tuple[int, bool] | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``call`` on all rows of the inputs, in pieces that it takes.

    A last piece that is too short is filled up with its last row, whose outputs are dropped: a row's output is its own.

    Raises:
        QuantflowError: at stage ``"verify"``, for an output that has not one row for each example.
    """
    rows = rows_of(args, kwargs)
    if taken is None or rows is None or rows == taken[0] or (rows < taken[0] and not taken[1]):
        return call(args, kwargs)
    most, exactly = taken
    pieces = []
    for start in range(0, rows, most):
        index = torch.arange(start, start + most if exactly else min(start + most, rows)).clamp(max=rows - 1)
        piece = pytree.tree_map_only(torch.Tensor, lambda t, index=index: t[index.to(t.device)], (args, kwargs))
        pieces.append(pytree.tree_flatten(call(*piece)))
    return pytree.tree_unflatten(
        [_joined(parts, rows, most) for parts in zip(*(p[0] for p in pieces), strict=True)], pieces[0][1]
    )


def _joined(parts: tuple[Any, ...], rows: int, most: int) -> Any:
    if not isinstance(parts[0], torch.Tensor):
        return parts[0]
    if not parts[0].ndim or parts[0].shape[0] != most:
        reason = f"an output of shape {list(parts[0].shape)} has not one row for each of {most} examples"
        raise QuantflowError("verify", reason, remedy=f"give batches of {most}")
    return torch.cat(parts)[:rows]
