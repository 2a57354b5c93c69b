"""Seeded random inputs in the shapes of a signature, to compare programs without data."""

from __future__ import annotations

from typing import Any

import torch

from quantflow.errors import QuantflowError
from quantflow.signature.signature import DynamicDim, Input, Signature
from quantflow.upstream import pytree

_VARYING = 2  # the size of a dimension without an upper bound


def random_batches(signature: Signature, count: int, seed: int) -> list[Any]:
    """``count`` batches for ``signature``: floats from a normal distribution, integers 0 and 1.

    Raises:
        QuantflowError: at stage ``"data"``, for a program whose inputs are not all tensors.
    """
    if any(given.dtype is None for given in signature.inputs):
        raise QuantflowError("data", "it takes more than tensors", node="inputs", remedy="qf.verify, with data")
    generator = torch.Generator().manual_seed(seed)
    flat = [[_draw(given, generator) for given in signature.inputs] for _ in range(count)]
    if signature.in_spec is None:
        return [(tuple(inputs), None) for inputs in flat]
    calls = [pytree.tree_unflatten(inputs, signature.in_spec) for inputs in flat]
    if not calls[0][1]:
        return [(args, None) for args, _ in calls]
    names = [given.name for given in signature.inputs]
    return [dict(zip(names, inputs, strict=True)) for inputs in flat]


def _draw(given: Input, generator: torch.Generator) -> torch.Tensor:
    sizes = [d if isinstance(d, int) else _largest(d) for d in given.shape]
    dtype = getattr(torch, str(given.dtype))
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    return torch.randint(0, 2, sizes, generator=generator).to(dtype)


def _largest(dim: DynamicDim) -> int:
    return max(dim.min, _VARYING) if dim.max is None else dim.max
