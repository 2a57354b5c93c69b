"""Everything that a training run is made of, to and from a checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from quantflow import distributed
from quantflow.errors import QuantflowError
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.graph.graph_pickle import target_name
from quantflow.graph.modes import TRACKING
from quantflow.training.encoding import Tensors, decode, difference, encode
from quantflow.training.history import History
from quantflow.training.randomness import random_state, set_random_state

# What has a state of its own, by the name of its attribute.
_STATEFUL = ("optimizer", "scheduler", "scaler")


@dataclass
class TrainingState:
    """A run in progress.

    Attributes:
        graph: What is trained.
        optimizer: Its optimizer.
        scheduler: Learning rate scheduler, or None.
        scaler: Gradient scaler of mixed precision.
        average: Exponential moving average of the parameters, or None.
        history: Figures so far.
        epoch: The epoch under way.
        batch: How many of its batches are done.
        step: How many batches are done in all.
        loss_sum: Sum of their losses in this epoch.
        best: The state of the graph with the best metric so far, None before any.
        best_metric: That metric.
        data_random: The random state in which the data go on: they draw from a stream of their own.
        epoch_start: That in which this epoch's data began.
    """

    graph: TrainableGraphModule
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    average: AveragedModel | None
    history: History = field(default_factory=History)
    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best: Tensors | None = None
    best_metric: float = float("-inf")
    data_random: Tensors = field(default_factory=dict)
    epoch_start: Tensors = field(default_factory=dict)

    def fingerprint(self, *options: Any) -> str:
        """What a checkpoint must share to be one of this run: the graph, the optimizer, and ``options``."""
        shapes = {name: list(t.shape) for name, t in self.graph.state_dict().items()}
        nodes = [n for n in self.graph.graph.nodes if n.op != "get_attr" and TRACKING not in n.meta]  # in either mode
        called = [f"{n.op} {target_name(n.target)}" for n in nodes]
        groups = [{k: v for k, v in g.items() if _plain(v)} for g in self.optimizer.state_dict()["param_groups"]]
        # A scheduler moves the learning rate; where it started tells the run.
        moved = [{"params"} | ({"lr"} if "initial_lr" in g else set()) for g in groups]
        groups = [{k: v for k, v in g.items() if k not in left} for g, left in zip(groups, moved, strict=True)]
        kinds = [type(self.optimizer).__name__, type(self.scheduler).__name__]
        text = json.dumps([shapes, called, kinds, groups, options], default=str, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def saved(self) -> tuple[Tensors, dict[str, Any]]:
        """The tensors of the run, by name, and the rest of it, as JSON data. All processes take part.

        Raises:
            QuantflowError: at stage ``"train"``, naming what can't be saved.
        """
        parts: dict[str, Tensors] = {
            "graph": self.graph.state_dict(),
            "best": self.best or {},
            "average": dict(self.average.module.state_dict()) if self.average else {},
        }
        for name, own in (("random", random_state()), ("data", self.data_random), ("start", self.epoch_start)):
            parts |= {f"{name}{rank}": theirs for rank, theirs in enumerate(distributed.gathered(own))}
        tensors = {f"{part}/{name}": t for part, named in parts.items() for name, t in named.items()}
        plain, held = self._stateful()
        figures = {
            "history": asdict(self.history),
            "position": [self.epoch, self.batch, self.step, self.loss_sum],
            "best_metric": self.best_metric,
            "averaged": int(self.average.n_averaged) if self.average else 0,
        }
        return tensors | held, {**figures, **plain}

    def restore(self, tensors: Tensors, plain: dict[str, Any]) -> None:
        """Bring the run into the state of a checkpoint.

        Raises:
            QuantflowError: at stage ``"train"``, when the optimizer, the scheduler or the scaler does not take up its own.
        """
        parts: dict[str, Tensors] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        self.graph.load_state_dict(parts["graph"])
        self.best = parts.get("best") or None
        if self.average is not None:
            self.average.module.load_state_dict(parts["average"])
            self.average.n_averaged.fill_(plain["averaged"])
        for name in _STATEFUL:
            if (owner := getattr(self, name)) is not None:
                owner.load_state_dict(decode(plain[name], tensors))
        self._check_taken_up(tensors, plain)
        self.history = History(**plain["history"])
        self.epoch, self.batch, self.step, self.loss_sum = plain["position"]
        self.best_metric = plain["best_metric"]
        self.data_random = parts[f"data{distributed.rank()}"]
        self.epoch_start = parts.get(f"start{distributed.rank()}", {})
        set_random_state(parts[f"random{distributed.rank()}"])

    def check_can_be_saved(self) -> None:
        """Refuse what has no form in a checkpoint.

        Raises:
            QuantflowError: at stage ``"train"``, naming it.
        """
        self._stateful()

    def _stateful(self) -> tuple[dict[str, Any], Tensors]:
        """The states of the optimizer, the scheduler and the scaler: JSON data, and their tensors."""
        tensors: Tensors = {}
        owners = {name: getattr(self, name) for name in _STATEFUL}
        return {n: o if o is None else encode(o.state_dict(), n, tensors) for n, o in owners.items()}, tensors

    def _check_taken_up(self, tensors: Tensors, plain: dict[str, Any]) -> None:
        """Refuse to go on from another state than the one saved: the run would end elsewhere, silently."""
        now, held = self._stateful()
        for name in _STATEFUL:
            differs = difference(plain[name], now[name], tensors, held)
            if differs is not None:
                reason = f"a {type(getattr(self, name)).__name__} does not take up the state that it gave: {differs}"
                remedy = "start anew with Checkpoints(..., resume=False), or use another"
                raise QuantflowError("train", reason, node=name, remedy=remedy)


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, bool, str, list, tuple, type(None)))
