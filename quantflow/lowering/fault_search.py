"""A search, within a time limit, for the operators that a delegate refuses or computes wrongly."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import Interpreter, Node
from torch.fx.node import Target
from tqdm import tqdm

from quantflow.delegates import lowered_modules
from quantflow.graph.aten import label
from quantflow.metrics import signal_to_noise
from quantflow.runtime import isolated
from quantflow.upstream import pytree

SECONDS = 300.0  # the time limit of a search
_SHOWN_AFTER = 2.0  # seconds until the progress bar appears
_FLOAT_SQNR = 60.0  # dB, the smallest SQNR of a correct float operator
_OFF_BY_ONE = 0.1  # the fraction of integers that may differ by one
_ROUNDING = 1e-5
_CALL: Any = torch.ops.higher_order.executorch_call_delegate
T = TypeVar("T")


class FaultSearch:
    """Finds the nodes of an edge program that a delegate does not run as in the graph.

    Args:
        seconds: The time limit.

    Attributes:
        names: The name for messages of each node that was found.
    """

    def __init__(self, seconds: float = SECONDS) -> None:
        self.deadline = time.monotonic() + seconds
        self.names: dict[str, str] = {}

    @property
    def over(self) -> bool:
        """Whether the time limit is exceeded."""
        return time.monotonic() > self.deadline

    def alone(self, edge: ExportedProgram, inputs: Sequence[object] | None) -> set[str]:
        """Return the faulty nodes when each operator runs in a separate program.

        Args:
            edge: The ``ExportedProgram`` in the edge dialect, with each operator delegated alone.
            inputs: The flat inputs for a comparison of results; None only loads the programs.
        """
        if inputs is None:
            programs = self._within(list(lowered_modules(edge.graph_module)))
            made = ((buffer, nodes) for lowered, nodes in programs if (buffer := _buffer_of(lowered)) is not None)
            found = [node for buffer, nodes in made if not isolated.run(buffer).loaded for node in nodes]
        else:
            found = _Compared(edge, self._within).search(inputs)
        return self.named(found)

    def together(self, nodes: Sequence[Node], wrong_without: Callable[[frozenset[str]], bool]) -> set[str]:
        """Return the first node, in graph order, whose delegation makes the program wrong: without this node and all later
        ones in the delegate, the program is right. The set is empty if there is no such node or the time limit is exceeded.

        Args:
            nodes: The operators inside the delegate, in graph order.
            wrong_without: Whether the program is still wrong with the given nodes left out of the delegate.
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
        """Return the names of ``nodes``, and store their names for messages."""
        found = {node.name: label(node) for node in nodes}
        self.names.update(found)
        return set(found)


class _Compared(Interpreter):
    """Runs an edge program in PyTorch, and each of its delegated operators on the runtime with the same input tensors.

    Attributes:
        faulty: The nodes of the operators that do not load, do not run or give another result.
    """

    def __init__(self, edge: ExportedProgram, within: Callable[[Iterable[Node]], Iterable[Node]]) -> None:
        super().__init__(edge.graph_module)
        self.edge, self.faulty = edge, list[Node]()
        self.nodes = dict(lowered_modules(edge.graph_module))
        self.progress = iter(within([n for n in edge.graph.nodes if n.target is _CALL]))

    def search(self, inputs: Sequence[object]) -> list[Node]:
        """Return the faulty nodes on the flat ``inputs``, as far as the time limit allows."""
        given = iter(inputs)
        held = {**self.edge.state_dict, **self.edge.constants}
        kinds = self.edge.graph_signature.input_specs
        with torch.no_grad():
            self.run(*(next(given) if k.kind is InputKind.USER_INPUT else held[str(k.target)].clone() for k in kinds))
        return self.faulty

    def call_function(self, target: Target, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Return the value of a node in PyTorch. A delegated operator also runs on the runtime."""
        if target is not _CALL:
            return super().call_function(target, args, kwargs)
        lowered, *given = args
        expected = lowered.original_module.module(check_guards=False)(*given)
        flat = pytree.tree_leaves(expected)
        if next(self.progress, None) is not None and (buffer := _buffer_of(lowered)) is not None:
            trial = isolated.run(buffer, [given])
            if trial.failure or not all(map(_same, trial.outputs[0], flat)):
                self.faulty.extend(self.nodes[lowered])
        return flat


def _buffer_of(lowered: Any) -> bytes | None:
    """A program of the delegate call ``lowered`` alone, or None if executorch can't make one."""
    try:
        return lowered.buffer()
    except Exception:  # as where the call has more inputs in its graph than in its signature
        return None


def _same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two results of one operator differ by no more than rounding."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    if theirs.is_floating_point():
        close = torch.allclose(ours, theirs, rtol=0.0, atol=_ROUNDING, equal_nan=True)
        return close or signal_to_noise(theirs, ours) >= _FLOAT_SQNR
    apart = (ours.long() - theirs.long()).abs()
    return not apart.numel() or (int(apart.max()) <= 1 and float((apart > 0).float().mean()) <= _OFF_BY_ONE)
