"""``Sample``: a random sample of the calibration data, which PTQ algorithms use in small batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch

from quantflow.digest import digest
from quantflow.distributed import gathered, world_size
from quantflow.errors import QuantflowError
from quantflow.observers.sampled import drawn_together
from quantflow.signature.signature import DynamicDim, Signature

Inputs = tuple[Any, ...]  # the flat inputs of one call of a graph, and the state before it if the graph keeps any

_BATCH = 8  # bounds the memory of a backward pass


class Sample:
    """A random sample of the batches that pass (reservoir sampling, seeded); its size does not grow with the data.

    Fill it by ``qf.calibrate(graph, data, sample=sample)``.

    Args:
        examples: How many examples to keep. A batch of fixed size counts as one.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> graph = qf.export(torch.nn.Linear(8, 4).eval(), (torch.randn(1, 8),), dynamic_batch=True).module()
        >>> sample = qf.Sample(examples=16)
        >>> prepared = qf.prepare(graph, XNNPACKQuantizer())
        >>> _ = qf.calibrate(prepared, [torch.randn(32, 8)], sample=sample, progress=False)
        >>> len(sample), [tuple(x.shape) for x, in sample.batches()]
        (16, [(8, 8), (8, 8)])
    """

    def __init__(self, examples: int = 128) -> None:
        self.examples = examples
        self._kept: list[Inputs] = []
        self._seen = 0
        self._cut: list[bool] = []  # for each input, whether it has one row per example
        self._last: dict[int, torch.Tensor] = {}  # the last copy of each input without rows per example
        self._common: tuple[list[Inputs], int] = [], 0  # common to all processes, of how many seen
        self._random = torch.Generator().manual_seed(0)

    def add(self, flat: Sequence[Any], signature: Signature) -> None:
        """Draw from a batch.

        Args:
            flat: The flat inputs of one call of a graph and, if it keeps state, the state before the call.
            signature: The signature of that graph, which says which inputs have a batch dimension.
        """
        cut = cut_inputs(signature)
        self._cut = [*cut, *[False] * (len(flat) - len(cut))]
        paired = list(zip(flat, self._cut, strict=True))
        for place, example in self._draw(next((t.shape[0] for t, by_example in paired if by_example), 1)):
            columns = enumerate(paired)
            kept = tuple(
                t[example : example + 1].clone() if by_example else self._whole(i, t) for i, (t, by_example) in columns
            )
            self._kept[place : place + 1] = [kept]

    def _whole(self, place: int, given: Any) -> Any:
        """A copy of an input without rows per example, shared by examples with equal values: a loader may reuse its memory."""
        if not _is(given):
            return given
        last = self._last.get(place)
        alike = last is not None and (last.dtype, last.device) == (given.dtype, given.device)
        if last is None or not alike or not torch.equal(last, given):
            last = self._last[place] = given.clone()
        return last

    def _draw(self, size: int) -> list[tuple[int, int]]:
        """The examples among ``size`` that enter the reservoir, and their places in it."""
        drawn = []
        for example in range(size):
            place = self._seen
            self._seen += 1
            if place >= self.examples:
                place = int(torch.randint(self._seen, (), generator=self._random))
            if place < self.examples:
                drawn.append((place, example))
        return drawn

    def synchronize(self) -> None:
        """Take equal shares of the samples of all processes, the same sample in each.

        What all processes held in common before counts once.
        """
        if world_size() == 1:
            return
        held, before = self._common
        held_by = gathered({"digest": torch.tensor(list(digest(_named(held)).encode()))})
        if not all(torch.equal(theirs["digest"], held_by[0]["digest"]) for theirs in held_by):
            held, before = [], 0  # the processes loaded different states
        own = [flat for flat in self._kept if all(flat is not known for known in held)]
        everyone = gathered({**_named(own), "seen": torch.tensor(self._seen)})
        seen = before + sum(int(theirs.pop("seen")) - before for theirs in everyone)
        drawn = [_examples(theirs, self._kept[0]) for theirs in everyone] if self._kept else []
        self._kept, self._seen = drawn_together(held, drawn, self.examples, before / max(seen, 1)), seen
        self._common = list(self._kept), seen

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the examples by name and the state of the random generator: a sample that loads them draws on alike.

        Raises:
            QuantflowError: at stage ``"calibrate"``, for inputs that are no tensors.
        """
        kept = {f"kept.{i}.{j}": t for i, flat in enumerate(self._kept) for j, t in enumerate(flat)}
        if odd := next((name for name, t in kept.items() if not _is(t)), None):
            reason, remedy = (
                "an input that is no tensor is not saved",
                "calibrate and recover without saving in between",
            )
            raise QuantflowError("calibrate", reason, node=odd, remedy=remedy)
        counts = {"examples": torch.tensor(self.examples), "seen": torch.tensor(self._seen)}
        return {**kept, **counts, "cut": torch.tensor(self._cut), "random": self._random.get_state()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take up what :meth:`state_dict` gave.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            QuantflowError: at stage ``"calibrate"``, for a state that is not a sample's.
        """
        try:
            cut = [bool(c) for c in state["cut"]]
            count = sum(name.startswith("kept.") for name in state) // max(len(cut), 1)
            kept = [tuple(state[f"kept.{i}.{j}"] for j in range(len(cut))) for i in range(count)]
            examples, seen = int(state["examples"]), int(state["seen"])
            self._random.set_state(state["random"])
        except (KeyError, RuntimeError, TypeError) as error:
            remedy = "pass what Sample.state_dict() gave"
            raise QuantflowError("calibrate", "not the state of a sample", node=str(error), remedy=remedy) from error
        self.examples, self._seen, self._cut, self._kept = examples, seen, cut, kept
        self._common = list(kept), seen

    def batches(self, most: int | None = None) -> tuple[Inputs, ...]:
        """Return the examples in shuffled batches of at most 8; inputs of other shapes form other batches.

        Args:
            most: The most examples to take; None for all.

        Returns:
            The batches; each is a tuple of the flat inputs of one call, and of the state before it if the graph keeps any.
        """
        order = torch.randperm(len(self._kept), generator=torch.Generator().manual_seed(0)).tolist()
        alike: dict[tuple, list[Inputs]] = {}
        for flat in (self._kept[i] for i in order[:most]):
            # Examples form a batch if their shapes agree and they share the inputs without rows per example.
            key = tuple(t.shape if by_example else id(t) for t, by_example in zip(flat, self._cut, strict=True))
            alike.setdefault(key, []).append(flat)
        size = _BATCH if any(self._cut) else 1
        groups = [group[i : i + size] for group in alike.values() for i in range(0, len(group), size)]
        return tuple(
            tuple(
                torch.cat(column) if by_example else column[0]
                for column, by_example in zip(zip(*group, strict=True), self._cut, strict=True)
            )
            for group in groups
        )

    def __len__(self) -> int:
        return len(self._kept)


def cut_inputs(signature: Signature) -> list[bool]:
    """For each input, whether it has one row per example in dimension 0: its size there is dynamic, and used nowhere else.

    All are False if the signature does not accept a batch of one example.
    """
    dims = [[(p, d.name) for p, d in enumerate(i.shape) if isinstance(d, DynamicDim)] for i in signature.inputs]
    batch = {name for found in dims for p, name in found if p == 0}
    elsewhere = {name for found in dims for p, name in found if p != 0}
    least = max((i.shape[0].min for i in signature.inputs if i.shape and isinstance(i.shape[0], DynamicDim)), default=1)
    if len(batch) != 1 or batch & elsewhere or least > 1:
        return [False] * len(dims)
    return [any(p == 0 for p, _ in found) for found in dims]


def _named(examples: Sequence[Inputs]) -> dict[str, torch.Tensor]:
    """The tensors of ``examples``, by the number of the example and the place of the input."""
    return {f"{i}.{j}": t for i, flat in enumerate(examples) for j, t in enumerate(flat) if _is(t)}


def _examples(named: Mapping[str, torch.Tensor], like: Inputs) -> list[Inputs]:
    """The examples with the tensors that :func:`_named` returned; other inputs are taken from ``like``."""
    count = len({name.split(".")[0] for name in named})
    places = list(enumerate(like))
    return [tuple(named[f"{i}.{j}"].to(t.device) if _is(t) else t for j, t in places) for i in range(count)]


def _is(value: object) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)
