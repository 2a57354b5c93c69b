"""The state of a training run, and its conversion to and from a checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel

from quantflow import distributed
from quantflow.errors import QuantflowError
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.graph.graph_pickle import target_name
from quantflow.graph.modes import TRACKING
from quantflow.training.encoding import Tensors, decode, difference, encode
from quantflow.training.history import History
from quantflow.training.randomness import random_state, set_random_state

# Attributes of the run whose objects have a state_dict.
_STATEFUL = ("optimizer", "scheduler", "scaler")


@dataclass
class TrainingState:
    """A training run in progress.

    Attributes:
        graph: The trained graph.
        optimizer: The optimizer.
        scheduler: Learning rate scheduler, or None.
        scaler: The gradient scaler of mixed precision.
        average: Exponential moving average of the parameters, or None.
        history: The losses and metrics so far.
        epoch: The current epoch.
        batch: The number of finished batches of this epoch.
        step: The number of finished batches of all epochs.
        loss_sum: The sum of the losses of this epoch.
        best: The state of the graph with the best metric so far; None before the first.
        best_metric: The best metric so far.
        data_random: The current state of the data's random stream.
        epoch_start: The state of that stream at the start of this epoch.
    """

    graph: TrainableGraphModule
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler | None
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

    def fingerprint(self, *options: object) -> str:
        """A digest of the graph, the optimizer and ``options``, equal for all checkpoints of this run."""
        shapes = {name: list(t.shape) for name, t in self.graph.state_dict().items()}
        nodes = [n for n in self.graph.graph.nodes if n.op != "get_attr" and TRACKING not in n.meta]  # in either mode
        called = [f"{n.op} {target_name(n.target)}" for n in nodes]
        groups = [{k: v for k, v in g.items() if _plain(v)} for g in self.optimizer.state_dict()["param_groups"]]
        # A scheduler changes the learning rate, so the initial one identifies the run.
        moved = [{"params"} | ({"lr"} if "initial_lr" in g else set()) for g in groups]
        groups = [{k: v for k, v in g.items() if k not in left} for g, left in zip(groups, moved, strict=True)]
        kinds = [type(self.optimizer).__name__, type(self.scheduler).__name__]
        text = json.dumps([shapes, called, kinds, groups, options], default=str, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def keep(self, graph: TrainableGraphModule, metric: float, epoch: int) -> None:
        """Keep the state of ``graph`` as the best."""
        self.best_metric, self.history.best_epoch = metric, epoch
        self.best = {name: tensor.detach().clone() for name, tensor in graph.state_dict().items()}

    def saved(self) -> tuple[Tensors, dict[str, Any]]:
        """The tensors of the run by name, and the rest of its state as JSON data. All processes must call it.

        Raises:
            QuantflowError: at stage ``"train"``, naming a value that can't be saved.
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
        """Restore the run from a checkpoint.

        Raises:
            QuantflowError: at stage ``"train"``, if the optimizer, the scheduler or the scaler does not restore its own state.
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
        """Raise if the run has state that a checkpoint can't hold.

        Raises:
            QuantflowError: at stage ``"train"``, naming that state.
        """
        self._stateful()

    def _stateful(self) -> tuple[dict[str, Any], Tensors]:
        """The states of the optimizer, the scheduler and the scaler, as JSON data and tensors."""
        tensors: Tensors = {}
        owners = {name: getattr(self, name) for name in _STATEFUL}
        return {n: o if o is None else encode(o.state_dict(), n, tensors) for n, o in owners.items()}, tensors

    def _check_taken_up(self, tensors: Tensors, plain: dict[str, Any]) -> None:
        """Raise if a restored state differs from the saved one: the run would silently end in another result."""
        now, held = self._stateful()
        for name in _STATEFUL:
            differs = difference(plain[name], now[name], tensors, held)
            if differs is not None:
                reason = f"a {type(getattr(self, name)).__name__} does not take up the state that it gave: {differs}"
                remedy = "start anew with Checkpoints(..., resume=False), or use another"
                raise QuantflowError("train", reason, node=name, remedy=remedy)


def _plain(value: object) -> bool:
    return isinstance(value, (int, float, bool, str, list, tuple, type(None)))
