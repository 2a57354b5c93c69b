"""The interface of a delegate that lowering uses."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import GraphModule

from quantflow.delegates.portable_rewrites import PORTABLE_REWRITES
from quantflow.errors import QuantflowWarning
from quantflow.graph.constant_folding import fold_constants
from quantflow.graph.half_precision import compute_in_float32, computed_in, named
from quantflow.graph.regions import inline_for_inference
from quantflow.graph.rewrites import CENTERED_NORM_REWRITES, rewrite

if TYPE_CHECKING:
    from executorch.exir.backend.partitioner import Partitioner
    from executorch.exir.pass_manager import PassType


class Delegate:
    """A backend given by partitioners that claim edge nodes for it. The base class holds any executorch partitioners."""

    centers_norms = False
    lacks: frozenset[torch.dtype] = frozenset()  # the dtypes of half precision in which the backend has no kernels

    def __init__(self, partitioners: Sequence[Partitioner] = ()) -> None:
        self._partitioners = list(partitioners)

    def partitioners(self, refused: frozenset[str] = frozenset()) -> list[Partitioner]:
        """Return the partitioners. quantflow's own leave out the edge nodes named in ``refused``; others can't."""
        return self._partitioners

    def one_by_one(self, refused: frozenset[str] = frozenset()) -> list[Partitioner]:
        """Return partitioners that delegate each operator in a call of its own, to find a faulty one; empty if unknown."""
        return []

    def rewrite(self, graph: GraphModule) -> None:
        """Replace operators that the backend lacks or computes wrongly, in place and exact in float, for inference.

        The base class changes nothing if it has partitioners, because the operators that they take are unknown.
        """
        if not self._partitioners:
            rewrite(graph, PORTABLE_REWRITES)

    def rewrite_for_lowering(self, graph: GraphModule) -> None:
        """Inline regions, fold constants, :meth:`rewrite` ``graph``, and center norms if this delegate does."""
        inline_for_inference(graph)
        self._compute_in_float32(graph)
        fold_constants(graph)
        self.rewrite(graph)
        fold_constants(graph)
        if self.centers_norms:
            rewrite(graph, CENTERED_NORM_REWRITES)

    def _compute_in_float32(self, graph: GraphModule) -> None:
        if half := compute_in_float32(graph, self.lacks):
            reason = f"{named(half)} has no kernels here, and becomes float32"
            remedy = "none, or float16 where the backend has it"
        elif half := computed_in(graph, self.lacks):
            reason, remedy = (
                f"{named(half)} has no kernels here, and state in it keeps the graph in it",
                "float32 or float16 state",
            )
        if half:
            warnings.warn(QuantflowWarning("edge", reason, node="graph", remedy=remedy), stacklevel=2)

    def centering_norms(self) -> Delegate:
        """A copy of the delegate that subtracts the mean before each layer norm."""
        centering = copy.copy(self)
        centering.centers_norms = True
        return centering

    def passes(self) -> list[PassType]:
        """Return the passes that run on the edge program before it is partitioned."""
        return []
