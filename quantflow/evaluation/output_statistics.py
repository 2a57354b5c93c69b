"""Statistics of the outputs of a stage, accumulated batch by batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from quantflow.errors import QuantflowError
from quantflow.evaluation.figures import OutputFigures
from quantflow.metrics import OutputComparison, PairedDrop, right
from quantflow.upstream import pytree

# A figure of all outputs and all targets.
Metric = Callable[[Any, Any], float | torch.Tensor]


class Tally:
    """Accumulated statistics of one stage, by output."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.against_first: list[OutputComparison] = []
        self.against_before: list[OutputComparison] = []
        self.drops: list[PairedDrop] = []

    def add(self, stage: str, output: object, first: object, before: object, target: object) -> None:
        """Add a batch: the outputs of ``stage``, of the first stage and of the previous stage, and the target.

        Raises:
            QuantflowError: at stage ``"verify"``, if they differ in number or shape, or if no output is a tensor.
        """
        reference = tensors(first)
        if not reference:
            raise QuantflowError("verify", "returns no tensor", node=stage, remedy="return one")
        if not self.names:
            self.names = list(reference)
            self.against_first, self.against_before = ([OutputComparison() for _ in self.names] for _ in range(2))
            self.drops = [PairedDrop() for _ in self.names]
        ours, theirs = list(tensors(output).values()), list(tensors(before).values())
        if len(ours) != len(reference):
            reason = f"returns {len(ours)} tensors, the first stage {len(reference)}"
            raise QuantflowError("verify", reason, node=stage, remedy="verify stages of one model")
        for i, (name, expected) in enumerate(reference.items()):
            if ours[i].shape != expected.shape:
                reason = f"{name} has shape {list(ours[i].shape)}, that of the first stage {list(expected.shape)}"
                raise QuantflowError("verify", reason, node=stage, remedy="verify stages of one model")
            self.against_first[i].add(expected, ours[i])
            self.against_before[i].add(theirs[i], ours[i])
            if isinstance(target, torch.Tensor):
                own, their = right(ours[i], target), right(expected, target)
                if own is not None and their is not None:
                    self.drops[i].add(their, own)

    @property
    def scored(self) -> bool:
        """Whether the targets are classes of any output."""
        return any(drop.rows for drop in self.drops)

    @property
    def top1(self) -> float | None:
        """Top-1 accuracy of the first output that has one."""
        return next((drop.top1 for drop in self.drops if drop.rows), None)

    def figures(self, *, first: bool) -> tuple[OutputFigures, ...]:
        """The figures of each output. The first stage has its accuracy only: it is the reference."""
        if first:
            return tuple(OutputFigures(n, d.top1) for n, d in zip(self.names, self.drops, strict=True))
        return tuple(
            OutputFigures(
                name, drop.top1, drop.points, drop.interval, ours.agreement, ours.sqnr_db, step.agreement, step.sqnr_db
            )
            for name, drop, ours, step in zip(
                self.names, self.drops, self.against_first, self.against_before, strict=True
            )
        )


class Outcomes:
    """All outputs and targets of one stage, for a metric of all of them."""

    def __init__(self) -> None:
        self.outputs: list[object] = []
        self.targets: list[object] = []

    def add(self, output: object, target: object) -> None:
        """Keep a batch."""
        self.outputs.append(output)
        self.targets.append(target)

    def score(self, metric: Metric) -> float:
        """The value of ``metric`` on all outputs and targets.

        Raises:
            QuantflowError: at stage ``"verify"``, if ``metric`` fails.
        """
        try:
            return float(metric(_joined(self.outputs), _joined(self.targets)))
        except Exception as error:
            reason, remedy = (
                f"{type(error).__name__}: {error}",
                "it takes all outputs and all targets, and returns a number",
            )
            raise QuantflowError("verify", reason, node="metric", remedy=remedy) from error


def tensors(output: object) -> dict[str, torch.Tensor]:
    """The tensors in the output of a model, by their path in its structure."""
    leaves, _ = pytree.tree_flatten_with_path(output)
    return {_name(path): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def _name(path: tuple[object, ...]) -> str:
    parts = (getattr(key, "key", getattr(key, "idx", getattr(key, "name", key))) for key in path)
    return ".".join(map(str, parts)) or "output"


def _joined(batches: list[object]) -> Any:
    """Batches of one structure as one: tensors concatenated along dimension 0, other leaves as a list."""
    flat = [pytree.tree_flatten(batch) for batch in batches]
    columns = zip(*(leaves for leaves, _ in flat), strict=True)
    joined = [torch.cat(c) if all(isinstance(t, torch.Tensor) and t.ndim for t in c) else list(c) for c in columns]
    return pytree.tree_unflatten(joined, flat[0][1])
