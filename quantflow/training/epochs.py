"""The batches of each epoch: in seeded order, continued after a resume, equally many in each process."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from quantflow import distributed
from quantflow.data.batches import Batch, PickInputs, batches, count_of
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.training.randomness import random_state, seed_everything, set_random_state
from quantflow.training.state import TrainingState

_OF_DATA = 0x9E3779B9  # separates the random stream of the data from that of the model


@dataclass
class Epochs:
    """The source of the batches of a training run.

    The data have their own random stream. A resumed run can therefore replay them without the random numbers that the network
    drew.

    Attributes:
        data: A loader, iterated once an epoch.
        inputs: Picks the inputs out of a batch.
        device: Where the tensors go.
        seed: The seed of the order.
        steps: The steps of an epoch; None if the data have no length.
    """

    data: Iterable[object]
    inputs: PickInputs | None
    device: torch.device
    seed: int
    steps: int | None = None

    def agree(self, peers: distributed.Peers) -> None:
        """Set the steps of an epoch to those of the process with the least data."""
        counts = peers.answers(count_of(self.data, stage="train"))
        self.steps = None if None in counts else min(counts)
        if self.steps is not None and max(counts) > self.steps:
            longer = [f"rank {rank} has {count}" for rank, count in enumerate(counts) if count > self.steps]
            self._warn(counts.index(self.steps), f"its share of the data has {self.steps} batches, {', '.join(longer)}")

    def start(self, run: TrainingState) -> None:
        """Seed the random streams of a new run."""
        seed = self.seed + distributed.rank()
        seed_everything(seed ^ _OF_DATA)
        run.data_random = random_state()
        seed_everything(seed)

    def batches(self, run: TrainingState, peers: distributed.Peers) -> Iterator[Batch]:
        """The remaining batches of the epoch, until any process has none."""
        done, feed = run.batch, self._begun(run)
        for _ in range(done):
            self._next(run, feed)
        for count in itertools.count(done):
            batch = self._next(run, feed)
            if batch is None and not count:
                raise self._empty(run)
            if batch is not None and batch.begins:
                reason, remedy = (
                    "training takes batches, no sequences of calls",
                    "pass batches; state goes on between them",
                )
                raise QuantflowError("train", reason, node="data", remedy=remedy)
            have = peers.answers(batch is not None)
            if batch is None or not all(have):
                break
            yield batch
        if any(have) and self.steps is None:
            longer = ", ".join(f"rank {rank}" for rank, more in enumerate(have) if more)
            self._warn(have.index(False), f"its share of the data has {count} batches, and more has {longer}")

    def _begun(self, run: TrainingState) -> Iterator[Batch]:
        """An iterator over this process's data from the start of the epoch."""
        if run.batch:  # the run was resumed within the epoch
            run.data_random = run.epoch_start
        run.epoch_start = run.data_random
        generator = getattr(self.data, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed((self.seed * 1_000_003 + run.epoch) % 2**64)
        sampler, in_batches = (getattr(self.data, name, None) for name in ("sampler", "batch_sampler"))
        for one in {id(s): s for s in (sampler, in_batches, getattr(in_batches, "sampler", None))}.values():
            if (set_epoch := getattr(one, "set_epoch", None)) is not None:
                set_epoch(run.epoch)
        return batches(self.data, run.graph, stage="train", inputs=self.inputs, device=self.device)

    def _next(self, run: TrainingState, feed: Iterator[Batch]) -> Batch | None:
        """The next batch, drawn with the random stream of the data."""
        networks = random_state()
        set_random_state(run.data_random)
        try:
            return next(feed, None)
        finally:
            run.data_random = random_state()
            set_random_state(networks)

    def _empty(self, run: TrainingState) -> QuantflowError:
        reason = "the training set is empty" if not run.epoch else f"the data gave nothing in epoch {run.epoch + 1}"
        remedy = "pass a DataLoader or a list with at least one batch; a generator can be read once only"
        return QuantflowError("train", reason, node="data", remedy=remedy)

    def _warn(self, rank: int, reason: str) -> None:
        if distributed.rank() == 0:
            remedy = "DistributedSampler gives equal shares: the rest of the longer ones is left out"
            warnings.warn(QuantflowWarning("train", reason, node=f"rank {rank}", remedy=remedy), stacklevel=4)
