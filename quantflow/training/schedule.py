"""The QAT schedule: when rounding starts, and when batch norm and observers freeze."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields

from quantflow.errors import QuantflowError
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.observers.fake_quantize import FakeQuantize


@dataclass(frozen=True)
class Schedule:
    """When QAT starts to round and when it freezes batch norm and observers, as fractions of all steps, 0 to 1.

    The defaults follow the usual course (Jacob et al. 2018, arXiv:1712.05877, section 3.1).

    Attributes:
        fake_quantize: From here on tensors are rounded; before, observers only watch.
        freeze_batch_norm: From here on batch norm uses its running statistics, as the integer program will.
        freeze_observers: From here on ranges stay.

    Example:
        >>> import quantflow as qf
        >>> schedule = qf.Schedule(fake_quantize=0.1, freeze_batch_norm=0.5)
        >>> schedule.state(0.6)  # rounds, batch norm is frozen, ranges still move
        (True, True, False)
        >>> qf.Schedule.from_json(schedule.to_json()) == schedule
        True
    """

    fake_quantize: float = 0.0
    freeze_batch_norm: float = 0.5
    freeze_observers: float = 0.75

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0.0 <= getattr(self, field.name) <= 1.0:
                reason = f"{getattr(self, field.name)} is no fraction of the training"
                raise QuantflowError("train", reason, node=f"schedule.{field.name}", remedy="0 (at once) to 1 (never)")

    @classmethod
    def never(cls) -> Schedule:
        """Return a schedule that rounds from the start and freezes nothing."""
        return cls(0.0, 1.0, 1.0)

    def apply(self, graph: TrainableGraphModule, progress: float, *, frozen: bool = False) -> None:
        """Bring ``graph`` to the state that holds at ``progress``.

        Args:
            graph: The graph that is trained.
            progress: The fraction of all steps done, 0 to 1.
            frozen: Keep batch norm frozen throughout.
        """
        graph.freeze_batch_norm(frozen or progress >= self.freeze_batch_norm)
        for module in graph.modules():
            if isinstance(module, FakeQuantize):
                module.enable_fake_quant(progress >= self.fake_quantize)
                module.enable_observer(progress < self.freeze_observers)

    def state(self, progress: float) -> tuple[bool, bool, bool]:
        """Return what is on at ``progress``; two equal states need no :meth:`apply` between them.

        Args:
            progress: The fraction of all steps done, 0 to 1.

        Returns:
            Whether tensors are rounded, batch norm is frozen, and observers are frozen.
        """
        return progress >= self.fake_quantize, progress >= self.freeze_batch_norm, progress >= self.freeze_observers

    def to_json(self) -> str:
        """Return a JSON text from which :meth:`from_json` builds an equal schedule."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Schedule:
        """Build the schedule that :meth:`to_json` wrote.

        Args:
            text: The JSON text.

        Returns:
            The schedule.

        Raises:
            QuantflowError: at stage ``"train"``, for an unknown key or a value that is no fraction.
        """
        data = json.loads(text)
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            remedy = f"one of {[f.name for f in fields(cls)]}"
            raise QuantflowError("train", f"unknown key {sorted(unknown)[0]!r}", node="schedule", remedy=remedy)
        return cls(**data)
