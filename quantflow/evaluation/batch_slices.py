"""Slicing of batches for stages of a fixed batch size, and concatenation of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from quantflow.data.sample import cut_inputs
from quantflow.errors import QuantflowError
from quantflow.signature.signature import DynamicDim, Input, Signature
from quantflow.upstream import pytree

Call = Callable[[tuple, dict[str, Any]], Any]


@dataclass(frozen=True)
class Pieces:
    """How the flat inputs of a batch are sliced.

    Attributes:
        cut: For each input, whether it has one row per example; the others are passed whole to every call.
        rows: The number of rows of the sliced inputs.
        most: The largest number of rows of a call.
        exactly: Whether every call needs exactly ``most`` rows.
    """

    cut: tuple[bool, ...]
    rows: int
    most: int
    exactly: bool

    @classmethod
    def of(cls, signature: Signature, flat: Sequence[Any]) -> Pieces | None:
        """How to slice ``flat`` to fit ``signature``; None if the shapes fit already or if slicing does not make them fit.

        An input holds examples if its number of rows differs from the one in the signature: it does not fit into one call.

        Raises:
            QuantflowError: at stage ``"verify"``, if it is ambiguous which inputs hold examples.
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
        """The inputs of the call with the rows from ``start`` on, padded with the last row if the number of rows is fixed."""
        stop = start + self.most if self.exactly else min(start + self.most, self.rows)
        index = torch.arange(start, stop).clamp(max=self.rows - 1)
        return [t[index.to(t.device)] if cut else t for t, cut in zip(flat, self.cut, strict=True)]


def rows_of(inputs: object, *others: object) -> int | None:
    """The number of examples in ``inputs``: dimension 0 of their tensors, except scalars.

    If the tensors differ in it, the number of rows of the first of ``others`` (targets, outputs) that equals one of theirs;
    None if there is none.
    """
    sizes = _leading(inputs)
    if len(set(sizes)) == 1:
        return sizes[0]
    return next((size for size in _leading(others) if size in sizes), None)


def one_call(
    signature: Signature | None, args: tuple, kwargs: dict[str, Any], rows: int
) -> tuple[tuple, dict[str, Any], int]:
    """The inputs of one call, from a batch of ``rows`` examples, and the number of its examples.

    That is one example, or as many as ``signature`` requires; the whole batch if it is ambiguous which inputs hold examples.
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
    """Run ``call``, whose inputs are ``signature``, on all rows of the inputs, in slices that fit.

    A last slice that is too short is padded with its last row, and the padded outputs are dropped.

    Raises:
        QuantflowError: at stage ``"verify"``, if it is ambiguous which inputs hold examples, or if an output does not have one
            row per example.
    """
    flat = _flat(signature, args, kwargs)
    pieces = None if signature is None or flat is None else Pieces.of(signature, flat)
    if signature is None or flat is None or pieces is None:
        return call(args, kwargs)
    found = []
    for start in range(0, pieces.rows, pieces.most):
        output = call(*signature.call(pieces.piece(flat, start)))
        own = pytree.tree_map_only(torch.Tensor, torch.clone, output)  # the next call may overwrite it
        found.append(pytree.tree_flatten(own))
    parts = zip(*(leaves for leaves, _ in found), strict=True)
    return pytree.tree_unflatten([_joined(part, pieces) for part in parts], found[0][1])


def _flat(signature: Signature | None, args: tuple, kwargs: dict[str, Any]) -> list[Any] | None:
    """The inputs in the order of ``signature``; None if their structure differs, for which the call raises a clearer error."""
    if signature is None:
        return None
    if signature.in_spec is None:
        leaves = pytree.tree_leaves((args, kwargs))
        return leaves if len(leaves) == len(signature.inputs) else None
    try:
        return signature.leaves(args, kwargs, stage="verify")
    except QuantflowError:
        return None


def _is_cut(declared: Input, given: object) -> bool:
    """Whether ``given`` fits ``declared`` except for the number of rows."""
    if declared.dtype is None or not declared.shape or not isinstance(given, torch.Tensor):
        return False
    if given.ndim != len(declared.shape) or not len(given):
        return False
    (first, *rest), (rows, *others) = declared.shape, given.shape
    if any(isinstance(d, int) and d != size for d, size in zip(rest, others, strict=True)):
        return False
    return rows != first if isinstance(first, int) else first.max is not None and rows > first.max


def _leading(tree: object) -> list[int]:
    return [t.shape[0] for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor) and t.ndim]


def _joined(parts: tuple[Any, ...], pieces: Pieces) -> Any:
    if not isinstance(parts[0], torch.Tensor):
        return parts[0]
    if not parts[0].ndim or parts[0].shape[0] != pieces.most:
        reason = f"an output of shape {list(parts[0].shape)} has not one row for each of {pieces.most} examples"
        raise QuantflowError("verify", reason, remedy=f"give batches of {pieces.most}")
    return torch.cat(parts)[: pieces.rows]
