"""The examples that recovery works on: a random sample of the calibration data, in small batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import torch

from quantflow.digest import digest
from quantflow.distributed import gathered, world_size
from quantflow.errors import QuantflowError
from quantflow.observers.sampled import drawn_together
from quantflow.signature.signature import DynamicDim, Signature

Inputs = tuple[Any, ...]  # the flat inputs of one call of a graph

_BATCH = 8  # what lives at once in a backward pass


class Sample:
    """A random sample of the data that pass (reservoir sampling, seeded), whatever their number and order.

    Fill it by ``qf.calibrate(graph, data, sample=sample)``.

    Args:
        examples: How many to keep. A batch of fixed size counts as one.
    """

    def __init__(self, examples: int = 128) -> None:
        self.examples = examples
        self._kept: list[Inputs] = []
        self._seen = 0
        self._cut: list[bool] = []  # which inputs hold one row for each example
        self._last: dict[int, torch.Tensor] = {}  # what was kept last of each input that is not cut
        self._common: tuple[list[Inputs], int] = [], 0  # what all processes hold, of how many seen
        self._random = torch.Generator().manual_seed(0)

    def add(self, flat: Sequence[Any], signature: Signature) -> None:
        """Draw from a batch of flat inputs of a graph with ``signature``."""
        self._cut = cut_inputs(signature)
        paired = list(zip(flat, self._cut, strict=True))
        for place, example in self._draw(next((t.shape[0] for t, by_example in paired if by_example), 1)):
            columns = enumerate(paired)
            kept = tuple(
                t[example : example + 1].clone() if by_example else self._whole(i, t) for i, (t, by_example) in columns
            )
            self._kept[place : place + 1] = [kept]

    def _whole(self, place: int, given: Any) -> Any:
        """A copy of an input that is not cut, one for all examples that have the same: a loader may write into its own."""
        if not _is(given):
            return given
        last = self._last.get(place)
        alike = last is not None and (last.dtype, last.device) == (given.dtype, given.device)
        if last is None or not alike or not torch.equal(last, given):
            last = self._last[place] = given.clone()
        return last

    def _draw(self, size: int) -> list[tuple[int, int]]:
        """Where in the reservoir each of ``size`` examples goes that goes there."""
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
        """Take equal shares of what all processes drew, the same in each; what they held in common before counts once."""
        if world_size() == 1:
            return
        held, before = self._common
        held_by = gathered({"digest": torch.tensor(list(digest(_named(held)).encode()))})
        if not all(torch.equal(theirs["digest"], held_by[0]["digest"]) for theirs in held_by):
            held, before = [], 0  # each took up a state of its own
        own = [flat for flat in self._kept if all(flat is not known for known in held)]
        everyone = gathered({**_named(own), "seen": torch.tensor(self._seen)})
        seen = before + sum(int(theirs.pop("seen")) - before for theirs in everyone)
        drawn = [_examples(theirs, self._kept[0]) for theirs in everyone] if self._kept else []
        self._kept, self._seen = drawn_together(held, drawn, self.examples, before / max(seen, 1)), seen
        self._common = list(self._kept), seen

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What was drawn so far, by name, and where the drawing stands: a sample that loads it goes on alike.

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
        """At most ``most`` of the examples kept, shuffled, in batches of at most 8 that can run together."""
        order = torch.randperm(len(self._kept), generator=torch.Generator().manual_seed(0)).tolist()
        alike: dict[tuple, list[Inputs]] = {}
        for flat in (self._kept[i] for i in order[:most]):
            # Those of one shape, and of the same inputs where these are not cut, form batches.
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
    """Which inputs are cut along dimension 0: all of dynamic batch size, where that size stands nowhere else.

    None is where one example alone is no batch that the signature takes.
    """
    dims = [[(p, d.name) for p, d in enumerate(i.shape) if isinstance(d, DynamicDim)] for i in signature.inputs]
    batch = {name for found in dims for p, name in found if p == 0}
    elsewhere = {name for found in dims for p, name in found if p != 0}
    least = max((i.shape[0].min for i in signature.inputs if i.shape and isinstance(i.shape[0], DynamicDim)), default=1)
    if len(batch) != 1 or batch & elsewhere or least > 1:
        return [False] * len(dims)
    return [any(p == 0 for p, _ in found) for found in dims]


def _named(examples: Sequence[Inputs]) -> dict[str, torch.Tensor]:
    """Their tensors, by number and place."""
    return {f"{i}.{j}": t for i, flat in enumerate(examples) for j, t in enumerate(flat) if _is(t)}


def _examples(named: Mapping[str, torch.Tensor], like: Inputs) -> list[Inputs]:
    """The examples of which :func:`_named` gave the tensors, with what is no tensor as in ``like``."""
    count = len({name.split(".")[0] for name in named})
    places = list(enumerate(like))
    return [tuple(named[f"{i}.{j}"].to(t.device) if _is(t) else t for j, t in places) for i in range(count)]


def _is(value: Any) -> TypeGuard[torch.Tensor]:
    return isinstance(value, torch.Tensor)
