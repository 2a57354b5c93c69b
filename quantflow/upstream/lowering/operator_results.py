"""A cache of results of edge operators on fake tensors, for :mod:`.retraces`.

Name: ``_op``, the ATen operator below an edge operator. The ``_op`` of an ATen operator is a builtin, so the results of ATen
operators are not kept.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantflow.upstream import pytree
from quantflow.upstream.fake_tensors import FakeTensor
from quantflow.upstream.operators import OpOverload, schema_of


class OperatorResults:
    """A cache of operator results, keyed by the operator and the identity of its input tensors and numbers."""

    _UNSURE = frozenset(
        {torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output}
    )
    _PLAIN = (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format, type(None))

    def __init__(self) -> None:
        self._found: dict[Any, tuple[Any, list[FakeTensor]]] = {}

    def run(self, target: Any, args: Any, kwargs: Any, compute: Callable[[], Any]) -> Any:
        """Return ``compute()``, or its cached result."""
        overload = getattr(target, "_op", target)  # below an edge operator
        if not isinstance(overload, OpOverload) or schema_of(overload).is_mutable:
            return compute()
        held: list[FakeTensor] = []
        key = self._key((args, sorted(kwargs.items())), held)
        if key is None or not self._UNSURE.isdisjoint(overload.tags):
            return compute()
        if (overload, key) in self._found:
            return self._found[overload, key][0]
        result = compute()
        if all(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(result)):
            self._found[overload, key] = result, held  # references keep the ids of the inputs unique
        return result

    def _key(self, given: Any, held: list[FakeTensor]) -> Any:
        if isinstance(given, FakeTensor) and given.constant is None:
            held.append(given)
            return FakeTensor, id(given)
        if isinstance(given, (list, tuple)):
            keys = tuple(self._key(g, held) for g in given)
            return None if None in keys else (type(given), keys)
        return (type(given), repr(given)) if isinstance(given, self._PLAIN) else None
