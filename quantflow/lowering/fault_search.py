"""The search for the operators that a delegate refuses or computes wrongly, within a bound of time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node
from tqdm import tqdm

from quantflow.delegates import lowered_modules
from quantflow.graph.aten import label
from quantflow.metrics import signal_to_noise
from quantflow.runtime import isolated

SECONDS = 300.0  # for all of a search
_SHOWN_AFTER = 2.0  # seconds
_FLOAT_SQNR = 60.0  # dB that one operator in float must agree to
_OFF_BY_ONE = 0.1  # the share of integers that may be one step off
_ROUNDING = 1e-5
_CALL: Any = torch.ops.higher_order.executorch_call_delegate
T = TypeVar("T")


class FaultSearch:
    """Finds the nodes of an edge program that a delegate does not run as the graph says.

    Args:
        seconds: When to stop looking.

    Attributes:
        names: What to call each node that was found before a person.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.deadline = time.monotonic() + seconds
        self.names: dict[str, str] = {}

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def alone(self, edge: ExportedProgram, inputs: Sequence[Any] | None) -> set[str]:
        """The nodes at fault when each runs in a program of its own.

        Args:
            edge: The ``ExportedProgram`` in the edge dialect, each operator of it handed to the delegate alone.
            inputs: The flat inputs on which to compare results; None only loads the programs.
        """
        if inputs is None:
            programs = self._within(list(lowered_modules(edge.graph_module)))
            found = [n for lowered, nodes in programs if not isolated.run(lowered.buffer()).loaded for n in nodes]
        else:
            found = _Compared(edge, self._within).search(inputs)
        return self.named(found)

    def together(self, nodes: Sequence[Node], wrong_without: Callable[[frozenset[str]], bool]) -> set[str]:
        """The first node, in the order of the graph, with which the program goes wrong, while it is right without that node and
        all behind it in the delegate; empty where that can't be told.

        Args:
            nodes: The operators inside the delegate, in that order.
            wrong_without: Whether the program is wrong still with these nodes left out of the delegate.
        """
        inside = [node.name for node in nodes]
        right, wrong = 0, len(inside)
        if not inside or wrong_without(frozenset(inside)):
            return set()
        with tqdm(desc="operator at fault", total=len(inside).bit_length(), delay=_SHOWN_AFTER, leave=False) as bar:
            while wrong - right > 1:
                if self.over:
                    return set()
                middle = (right + wrong) // 2
                if wrong_without(frozenset(inside[middle:])):
                    wrong = middle
                else:
                    right = middle
                bar.update()
        return self.named([nodes[wrong - 1]])

    def _within(self, items: Iterable[T]) -> Iterator[T]:
        for item in tqdm(items, desc="operators one by one", delay=_SHOWN_AFTER, leave=False):
            if self.over:
                return
            yield item

    def named(self, nodes: Iterable[Node]) -> set[str]:
        """The names of ``nodes``, which are kept with their layers."""
        found = {node.name: label(node) for node in nodes}
        self.names.update(found)
        return set(found)


class _Compared(Interpreter):
    """Runs an edge program in PyTorch and, from the same tensors, each delegated operator of it on the runtime as well.

    Attributes:
        faulty: The nodes of the operators that do not load, do not run or compute something else.
    """

    def __init__(self, edge: ExportedProgram, within: Callable[[Iterable[Node]], Iterable[Node]]) -> None:
        super().__init__(edge.graph_module)
        self.edge, self.faulty = edge, list[Node]()
        self.nodes = dict(lowered_modules(edge.graph_module))
        self.progress = iter(within([n for n in edge.graph.nodes if n.target is _CALL]))

    def search(self, inputs: Sequence[Any]) -> list[Node]:
        """The nodes at fault on the flat ``inputs``, as far as the time allows."""
        given = iter(inputs)
        held = {**self.edge.state_dict, **self.edge.constants}
        kinds = self.edge.graph_signature.input_specs
        with torch.no_grad():
            self.run(*(next(given) if k.kind is InputKind.USER_INPUT else held[str(k.target)].clone() for k in kinds))
        return self.faulty

    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The value of a node in PyTorch; what a delegate would run is also run there."""
        if target is not _CALL:
            return super().call_function(target, args, kwargs)
        lowered, *given = args
        expected = lowered.original_module.module(check_guards=False)(*given)
        flat = pytree.tree_leaves(expected)
        if next(self.progress, None) is not None:
            trial = isolated.run(lowered.buffer(), [given])
            if trial.failure or not all(map(_same, trial.outputs[0], flat)):
                self.faulty.extend(self.nodes[lowered])
        return flat


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether both are one operator's result, but for rounding."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if theirs.is_floating_point():
        close = torch.allclose(ours, theirs, rtol=0.0, atol=_ROUNDING, equal_nan=True)
        return close or signal_to_noise(theirs, ours) >= _FLOAT_SQNR
    apart = (ours.long() - theirs.long()).abs()
    return not apart.numel() or (int(apart.max()) <= 1 and float((apart > 0).float().mean()) <= _OFF_BY_ONE)
