"""Calls in as many rows as a stage takes: batches cut for a program of a fixed batch size, and its outputs joined again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree

from quantflow.data.sample import cut_inputs
from quantflow.errors import QuantflowError
from quantflow.signature.signature import DynamicDim, Input, Signature

Call = Callable[[tuple, dict[str, Any]], Any]


@dataclass(frozen=True)
class Pieces:
    """How the flat inputs of a batch are cut.

    Attributes:
        cut: Which of them hold a row for each example; the others go whole into every call.
        rows: How many rows these have.
        most: How many rows a call takes.
        exactly: Whether it takes no fewer.
    """

    cut: tuple[bool, ...]
    rows: int
    most: int
    exactly: bool

    @classmethod
    def of(cls, signature: Signature, flat: Sequence[Any]) -> Pieces | None:
        """The pieces of ``flat`` that fit ``signature``; None where the shapes fit as they are, or where cutting helps nothing.

        An input holds examples where it has another number of rows than the signature takes: in one call it fits nowhere.

        Raises:
            QuantflowError: at stage ``"verify"``, where it can't be told which inputs hold examples.
        """
        cut = tuple(_is_cut(declared, given) for declared, given in zip(signature.inputs, flat, strict=True))
        pairs = [(i, t) for i, t, c in zip(signature.inputs, flat, cut, strict=True) if c]
        if not pairs:
            return None
        takes, rows = {i.shape[0] for i, _ in pairs}, {t.shape[0] for _, t in pairs}
        reason = ""
        if len(takes) > 1 or len(rows) > 1:
            reason = "they differ in what they take in dimension 0"
        elif all(t.ndim == 1 for _, t in pairs):
            reason = "their one dimension may be examples or features"
        elif any(isinstance(d, DynamicDim) and d in takes for i in signature.inputs for d in i.shape[1:]):
            reason = "the batch size is that of another dimension as well"
        if reason:
            names = ", ".join(i.name for i, _ in pairs)
            remedy = f"give batches that it takes as they are: {signature.describe_inputs()}"
            raise QuantflowError("verify", f"can't tell its examples apart: {reason}", node=names, remedy=remedy)
        taken = takes.pop()
        most = taken if isinstance(taken, int) else taken.max or 1
        return cls(cut, rows.pop(), most, isinstance(taken, int))

    def piece(self, flat: Sequence[Any], start: int) -> list[Any]:
        """The rows from ``start`` on that make a call, filled up with the last one where it takes no fewer."""
        stop = start + self.most if self.exactly else min(start + self.most, self.rows)
        index = torch.arange(start, stop).clamp(max=self.rows - 1)
        return [t[index.to(t.device)] if cut else t for t, cut in zip(flat, self.cut, strict=True)]


def rows_of(inputs: Any, *others: Any) -> int | None:
    """How many examples ``inputs`` hold: dimension 0 of their tensors, scalars aside.

    Where they differ in it, what is said by the first of ``others`` (targets, outputs) that has as many rows as one of them;
    None where none has.
    """
    sizes = _leading(inputs)
    if len(set(sizes)) == 1:
        return sizes[0]
    return next((size for size in _leading(others) if size in sizes), None)


def one_call(
    signature: Signature | None, args: tuple, kwargs: dict[str, Any], rows: int
) -> tuple[tuple, dict[str, Any], int]:
    """Inputs of one call, out of a batch of ``rows`` examples, and how many examples that are.

    One example, or as many as ``signature`` is held to; all of the batch where it can't be told which inputs hold examples.
    """
    if signature is None:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, torch.Tensor)]
        if len(tensors) != 1 or tensors[0].ndim < 2:
            return args, kwargs, rows
        return *pytree.tree_unflatten([t[:1] if t is tensors[0] else t for t in leaves], spec), 1
    flat = _flat(signature, args, kwargs)
    if flat is None:
        return args, kwargs, rows
    pieces = Pieces.of(signature, flat)
    if pieces is not None and pieces.exactly:
        return *signature.call(pieces.piece(flat, 0)), pieces.most
    cut = cut_inputs(signature)
    if not any(cut):
        return args, kwargs, rows
    return *signature.call([t[:1] if c else t for t, c in zip(flat, cut, strict=True)]), 1


def in_rows(call: Call, signature: Signature | None, args: tuple, kwargs: dict[str, Any]) -> Any:
    """``call``, which takes ``signature``, on all rows of the inputs, in pieces that it takes.

    A last piece that is too short is filled up with its last row, whose outputs are dropped: a row's output is its own.

    Raises:
        QuantflowError: at stage ``"verify"``, where it can't be told which inputs hold examples, and for an output that has
            not one row for each example.
    """
    flat = _flat(signature, args, kwargs)
    pieces = None if signature is None or flat is None else Pieces.of(signature, flat)
    if signature is None or flat is None or pieces is None:
        return call(args, kwargs)
    found = []
    for start in range(0, pieces.rows, pieces.most):
        output = call(*signature.call(pieces.piece(flat, start)))
        own = pytree.tree_map_only(torch.Tensor, torch.clone, output)  # it may be state, which the next piece writes
        found.append(pytree.tree_flatten(own))
    parts = zip(*(leaves for leaves, _ in found), strict=True)
    return pytree.tree_unflatten([_joined(part, pieces) for part in parts], found[0][1])


def _flat(signature: Signature | None, args: tuple, kwargs: dict[str, Any]) -> list[Any] | None:
    """The inputs in the order of ``signature``; None where their structure is another, of which the call itself tells more."""
    if signature is None:
        return None
    if signature.in_spec is None:
        leaves = pytree.tree_leaves((args, kwargs))
        return leaves if len(leaves) == len(signature.inputs) else None
    try:
        return signature.leaves(args, kwargs, stage="verify")
    except QuantflowError:
        return None


def _is_cut(declared: Input, given: Any) -> bool:
    """Whether ``given`` has other rows than ``declared`` takes, and fits it but for these."""
    if declared.dtype is None or not declared.shape or not isinstance(given, torch.Tensor):
        return False
    if given.ndim != len(declared.shape) or not len(given):
        return False
    (first, *rest), (rows, *others) = declared.shape, given.shape
    if any(isinstance(d, int) and d != size for d, size in zip(rest, others, strict=True)):
        return False
    return rows != first if isinstance(first, int) else first.max is not None and rows > first.max


def _leading(tree: Any) -> list[int]:
    return [t.shape[0] for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and t.ndim]


def _joined(parts: tuple[Any, ...], pieces: Pieces) -> Any:
    if not isinstance(parts[0], torch.Tensor):
        return parts[0]
    if not parts[0].ndim or parts[0].shape[0] != pieces.most:
        reason = f"an output of shape {list(parts[0].shape)} has not one row for each of {pieces.most} examples"
        raise QuantflowError("verify", reason, remedy=f"give batches of {pieces.most}")
    return torch.cat(parts)[: pieces.rows]
