"""The results of verification: figures by stage and output, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass

from quantflow.latency import Latency
from quantflow.text_table import aligned


@dataclass(frozen=True)
class OutputFigures:
    """The figures of one output of one stage.

    Attributes:
        output: Its name in the model's own structure, ``"output"`` where it is the only one.
        top1: The share of targets that are its largest class, 0 to 1; None without targets, or where they are no classes of it.
        drop: By how many points ``top1`` is below that of the first stage.
        drop_interval: Half the width of the drop's 95 % interval, paired example by example, points.
        agreement: The share of examples with the same class as in the first stage, 0 to 1; None for an output without classes.
        sqnr_db: Signal to quantization noise ratio against the first stage, dB; infinite for equal outputs.
        step_agreement: As ``agreement``, against the stage before.
        step_sqnr_db: As ``sqnr_db``, against the stage before.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> model = torch.nn.Linear(8, 4).eval()
        >>> stages = {"float": model, "captured": qf.export(model, (torch.randn(1, 8),), dynamic_batch=True)}
        >>> found = qf.verify(stages, [torch.randn(16, 8)], latency_runs=0, progress=False)
        >>> found["captured"].output.agreement
        1.0
    """

    output: str
    top1: float | None = None
    drop: float | None = None
    drop_interval: float | None = None
    agreement: float | None = None
    sqnr_db: float | None = None
    step_agreement: float | None = None
    step_sqnr_db: float | None = None


@dataclass(frozen=True)
class StageFigures:
    """The figures of one stage.

    Attributes:
        name: The name that was given to it.
        kind: ``"float"``, ``"observed"``, ``"fake-quantized"``, ``"converted"`` or ``".pte"``.
        outputs: The figures of each output, in the model's order.
        metric: The value of the metric; by default top-1 of the first output that has one.
        bytes: The size of the file, or of parameters and buffers; None for a prepared graph.
        latency: The time of a call, for float models and programs; None for a stage that simulates integers.
        planned_bytes: The bytes that memory planning laid out, for a ``.pte``.
        delegates: Calls of delegates by backend, for a ``.pte``.
        kernels: Calls of executorch's own kernels by operator, for a ``.pte``.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> found = qf.verify({"float": torch.nn.Linear(8, 4).eval()}, [torch.randn(16, 8)], latency_runs=0, progress=False)
        >>> found["float"].kind, found["float"].bytes
        ('float', 144)
    """

    name: str
    kind: str
    outputs: tuple[OutputFigures, ...]
    metric: float | None = None
    bytes: int | None = None
    latency: Latency | None = None
    planned_bytes: int | None = None
    delegates: dict[str, int] | None = None
    kernels: dict[str, int] | None = None

    @property
    def output(self) -> OutputFigures:
        """The figures of the first output."""
        return self.outputs[0]


@dataclass(frozen=True)
class Verification:
    """The figures of all stages, as :func:`quantflow.verify` returns them; ``print`` shows a table, ``found[name]`` one stage.

    Attributes:
        stages: The stages in the order given; the first is what the others are compared with.
        examples: The number of examples that they ran on.
        metric: The name of the metric; None where there was nothing to score.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> model = torch.nn.Linear(8, 4).eval()
        >>> stages = {"float": model, "captured": qf.export(model, (torch.randn(1, 8),), dynamic_batch=True)}
        >>> found = qf.verify(stages, [torch.randn(16, 8)], latency_runs=0, progress=False)
        >>> found.examples, [stage.name for stage in found.stages]
        (16, ['float', 'captured'])
    """

    stages: tuple[StageFigures, ...]
    examples: int
    metric: str | None

    def __getitem__(self, name: str) -> StageFigures:
        """Return the figures of the stage ``name``.

        Args:
            name: The name that was given to the stage.

        Returns:
            The figures.

        Raises:
            KeyError: when there is no such stage.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise KeyError(name)

    def to_json(self) -> str:
        """Return all figures as a JSON object; a figure that is infinite or no number is written as a string."""
        return json.dumps(_plain(asdict(self)), indent=2)

    def table(self) -> list[list[str]]:
        """Return the figures as they are shown: a row of headings, then a row for each output of each stage.

        Columns without figures are left out.
        """
        rows = [row for stage in self.stages for row in self._rows(stage)]
        shown = [c for c in rows[0] if any(row[c] for row in rows)]
        return [shown, *([row[c] for c in shown] for row in rows)]

    def __str__(self) -> str:
        return "\n".join([*aligned(self.table(), figures=True), *self.notes()])

    def _rows(self, stage: StageFigures) -> Iterable[dict[str, str]]:
        for index, figures in enumerate(stage.outputs):
            whole = stage if index == 0 else StageFigures("", "", ())
            latency = whole.latency
            spread = "" if latency is None else f"{latency.median_ms:.2f} [{latency.low_ms:.2f}, {latency.high_ms:.2f}]"
            delegates, kernels = (None if c is None else sum(c.values()) for c in (whole.delegates, whole.kernels))
            yield {
                "stage": whole.name,
                "is": "" if whole.kind == whole.name else whole.kind,
                "output": figures.output if len(stage.outputs) > 1 else "",
                self._metric_shown(): _number(whole.metric, "{:.4f}"),
                "top-1": _number(figures.top1, "{:.2%}"),
                "drop, points": _drop(figures),
                "agreement": _number(figures.agreement, "{:.2%}"),
                "SQNR, dB": _number(figures.sqnr_db, "{:.1f}"),
                "step, dB": _number(figures.step_sqnr_db, "{:.1f}"),
                "bytes": _number(whole.bytes, "{:,}"),
                "latency, ms": spread,
                "planned bytes": _number(whole.planned_bytes, "{:,}"),
                "delegate calls": _number(delegates, "{}"),
                "kernel calls": _number(kernels, "{}"),
            }

    def _metric_shown(self) -> str:
        return "top-1" if self.metric in (None, "top-1") else str(self.metric)

    def notes(self) -> list[str]:
        """Return the lines below the table: the number of examples, what is compared with what, how latency was measured."""
        against = f"agreement and SQNR against {self.stages[0].name}, step against the stage before"
        notes = [f"{self.examples} examples" + (f"; {against}" if len(self.stages) > 1 else "")]
        timed = [(stage.kind, stage.latency) for stage in self.stages if stage.latency is not None]
        for runs in sorted({(t.rows, t.runs, t.warm_up) for _, t in timed}):
            rows, counted, warm_up = runs
            threads = {f"{t.threads} ({kind})" for kind, t in timed if (t.rows, t.runs, t.warm_up) == runs}
            of = f"{rows} example{'s' if rows > 1 else ''}"
            notes.append(
                f"latency of {of}: median [quartiles] of {counted} calls after {warm_up}; threads: {', '.join(sorted(threads))}"
            )
        return notes


def _drop(figures: OutputFigures) -> str:
    if figures.drop is None or figures.drop_interval is None:
        return ""
    return f"{figures.drop:.2f} ± {figures.drop_interval:.2f}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return round(value, 6) if math.isfinite(value) else str(value)
    return value
