"""Encoding of nested state as JSON data and tensors, without pickle, for checkpoints."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict, deque
from typing import Any

import torch

from quantflow.errors import QuantflowError

Tensors = dict[str, torch.Tensor]

_MAPPINGS: dict[str, Any] = {"dict": dict, "OrderedDict": OrderedDict, "Counter": Counter}
_SEQUENCES: dict[str, Any] = {"tuple": tuple, "set": set, "frozenset": frozenset, "deque": deque}


def encode(value: Any, where: str, tensors: Tensors) -> Any:
    """``value`` as JSON data; :func:`decode` restores an equal value of the same types.

    Args:
        value: Numbers, strings, None, tensors, and lists, tuples, sets, deques, dicts and Counters of them, with keys of any of
            these. Callables in a dict are omitted: their owner constructs them again.
        where: The name of ``value``, for its tensors and for errors.
        tensors: Receives the tensors, by names that begin with ``where``.

    Raises:
        QuantflowError: at stage ``"train"``, naming a value of another type.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        while where in tensors:  # the keys 1 and "1" give the same name
            where += "'"
        tensors[where] = value
        return {"tensor": where}
    if type(value) is list:
        return [encode(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
    for name, kind in _MAPPINGS.items():
        if type(value) is kind:
            kept = [(key, item) for key, item in value.items() if not callable(item)]
            pairs = [(encode(k, where, tensors), encode(v, f"{where}.{k}", tensors)) for k, v in kept]
            return {name: pairs}
    for name, kind in _SEQUENCES.items():
        if type(value) is kind:
            bound = {"maxlen": value.maxlen} if isinstance(value, deque) else {}
            items = [encode(item, f"{where}.{i}", tensors) for i, item in enumerate(value)]
            return {name: sorted(items, key=json.dumps) if isinstance(value, (set, frozenset)) else items, **bound}
    reason = f"a {type(value).__name__} can't be saved without pickle"
    remedy = "train without checkpoints, or give its owner a state_dict() of numbers, texts and tensors"
    raise QuantflowError("train", reason, node=where, remedy=remedy)


def decode(data: Any, tensors: Tensors) -> Any:
    """The value that :func:`encode` received."""
    if isinstance(data, list):
        return [decode(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    ((name, held), *bound) = data.items()
    if name == "tensor":
        return tensors[held]
    if name in _MAPPINGS:
        return _MAPPINGS[name]({decode(key, tensors): decode(item, tensors) for key, item in held})
    items = [decode(item, tensors) for item in held]
    return deque(items, **dict(bound)) if name == "deque" else _SEQUENCES[name](items)


def difference(one: object, other: object, tensors: Tensors, others: Tensors) -> str | None:
    """The first place where two encoded states are not bitwise equal; None if they are. The order in a dict is ignored."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        (name,) = one.keys() - {"maxlen"}
        if name == "tensor":
            return None if _same_bits(tensors[one[name]], others[other[name]]) else one[name]
        if name in _MAPPINGS:
            ours, theirs = ({json.dumps(key): item for key, item in held[name]} for held in (one, other))
            if ours.keys() != theirs.keys():
                return ", ".join(sorted(ours.keys() ^ theirs.keys()))
            for key, item in ours.items():
                if (differs := difference(item, theirs[key], tensors, others)) is not None:
                    return f"{key}: {differs}"
            return None
        one, other = one[name], other[name]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        found = (difference(a, b, tensors, others) for a, b in zip(one, other, strict=True))
        return next(filter(None, found), None)
    return None if json.dumps(one) == json.dumps(other) else f"{json.dumps(other)[:80]} for {json.dumps(one)[:80]}"


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    ours, theirs = (t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(ours, theirs)
