"""Everything that a training run is made of, to and from a checkpoint."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.optim.swa_utils import AveragedModel

from quantflow import distributed
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.training.history import History
from quantflow.training.randomness import random_state, set_random_state


@dataclass
class TrainingState:
    """A run in progress.

    Attributes:
        graph: What is trained.
        optimizer: Its optimizer.
        scheduler: Learning rate scheduler, stepped each batch, or None.
        scaler: Gradient scaler of mixed precision.
        average: Exponential moving average of the parameters, or None.
        history: Figures so far.
        epoch: The epoch under way.
        batch: How many of its batches are done.
        step: How many batches are done in all.
        loss_sum: Sum of their losses in this epoch.
        best: The state of the graph with the best metric so far, None before any.
        best_metric: That metric.
        epoch_start: The random state in which this epoch's loader was started.
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
    best: dict[str, torch.Tensor] | None = None
    best_metric: float = float("-inf")
    epoch_start: dict[str, torch.Tensor] = field(default_factory=dict)

    def fingerprint(self, *options: Any) -> str:
        """What a checkpoint must share to be one of this run: the graph, the optimizer, and ``options``."""
        shapes = {name: list(t.shape) for name, t in self.graph.state_dict().items()}
        nodes = [f"{n.op} {n.target}" for n in self.graph.graph.nodes if n.op != "get_attr"]
        groups = [{k: v for k, v in g.items() if _plain(v)} for g in self.optimizer.state_dict()["param_groups"]]
        # Learning rates move; where they started tells the run.
        groups = [{k: v for k, v in g.items() if k not in ("lr", "params") or k == "initial_lr"} for g in groups]
        text = json.dumps([shapes, nodes, type(self.optimizer).__name__, groups, options], default=str, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the run, by name."""
        parts: dict[str, dict[str, torch.Tensor]] = {
            "graph": self.graph.state_dict(),
            "best": self.best or {},
            "average": dict(self.average.module.state_dict()) if self.average else {},
            **{f"random{rank}": state for rank, state in enumerate(distributed.gathered(random_state()))},
            **{f"epoch_start{rank}": state for rank, state in enumerate(distributed.gathered(self.epoch_start))},
            "optimizer": {
                f"{index}.{name}": value
                for index, entries in self.optimizer.state_dict()["state"].items()
                for name, value in entries.items()
                if isinstance(value, torch.Tensor)
            },
        }
        return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}

    def plain(self) -> dict[str, Any]:
        """The rest of the run, as JSON data."""
        state = self.optimizer.state_dict()
        return {
            "history": asdict(self.history),
            "position": [self.epoch, self.batch, self.step, self.loss_sum],
            "best_metric": self.best_metric,
            "averaged": int(self.average.n_averaged) if self.average else 0,
            "scheduler": _jsonable(self.scheduler.state_dict()) if self.scheduler is not None else None,
            "scaler": _jsonable(self.scaler.state_dict()),
            "param_groups": _jsonable(state["param_groups"]),
            "optimizer": {
                str(index): {k: v for k, v in entries.items() if not isinstance(v, torch.Tensor)}
                for index, entries in state["state"].items()
            },
        }

    def restore(self, tensors: dict[str, torch.Tensor], plain: dict[str, Any]) -> None:
        """Bring the run into the state of a checkpoint."""
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor
        self.graph.load_state_dict(parts["graph"])
        self.best = parts.get("best") or None
        if self.average is not None:
            self.average.module.load_state_dict(parts["average"])
            self.average.n_averaged.fill_(plain["averaged"])
        states: dict[int, dict[str, Any]] = {int(i): dict(entries) for i, entries in plain["optimizer"].items()}
        for name, tensor in parts.get("optimizer", {}).items():
            index, _, entry = name.partition(".")
            states[int(index)][entry] = tensor
        self.optimizer.load_state_dict({"state": states, "param_groups": plain["param_groups"]})
        if self.scheduler is not None:
            self.scheduler.load_state_dict(plain["scheduler"])
        self.scaler.load_state_dict(plain["scaler"])
        self.history = History(**plain["history"])
        self.epoch, self.batch, self.step, self.loss_sum = plain["position"]
        self.best_metric = plain["best_metric"]
        self.epoch_start = parts[f"epoch_start{distributed.rank()}"]
        set_random_state(parts[f"random{distributed.rank()}"])


def _plain(value: Any) -> bool:
    return isinstance(value, (int, float, bool, str, list, tuple, type(None)))


def _jsonable(value: Any) -> Any:
    """``value`` with only what JSON holds; a scheduler keeps callables of its own, which it makes again."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items() if _plain(v) or isinstance(v, dict)}
    return [_jsonable(v) for v in value] if isinstance(value, (list, tuple)) else value
