"""``verify``: compares each stage of a model with the first one, on the same data."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from tqdm import tqdm

from quantflow import latency, runtime
from quantflow.data.batches import Batch, PickInputs, count_of, taken_apart
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.evaluation.batch_slices import one_call, rows_of
from quantflow.evaluation.figures import StageFigures, Verification
from quantflow.evaluation.output_statistics import Metric, Outcomes, Tally
from quantflow.evaluation.runnable import FLOAT, PTE, Stage, flat_signature
from quantflow.graph.own_state import OwnState
from quantflow.latency import Latency
from quantflow.signature.signature import Signature
from quantflow.upstream import pytree


def verify(
    stages: Mapping[str, object],
    data: Iterable[object],
    *,
    metric: Metric | None = None,
    inputs: PickInputs | None = None,
    max_batches: int | None = None,
    latency_runs: int = 30,
    progress: bool = True,
) -> Verification:
    """Run all ``stages`` on the same data, in one pass, and compare them.

    The first stage is what the others are compared with. Each is compared with the one before it as well, so that in float,
    prepared, converted, ``.pte`` the step that loses is seen. Prepared graphs are simulated in integers, those of stock
    torchao too, and learn nothing. A stage made for batches of one size gets the data in batches of that size.

    Args:
        stages: By name: an ``nn.Module`` (eager, captured, prepared or converted, by any tool), an ``Exported``, a
            ``CoreAten``, a ``torch.export.ExportedProgram``, a ``Program``, or the path of a ``.pte`` from anywhere, which is
            first run in a process of its own.
        data: Batches, as for :func:`quantflow.calibrate`, on CPU or where the stages are. State goes on from batch to batch and
            begins anew, in each stage, with each :class:`quantflow.CallSequence`.
        metric: ``metric(outputs, targets)`` of all outputs, in the model's own structure, and all targets (both
            concatenated, and kept for it until the end); by default top-1 accuracy of each output, where there are targets.
        inputs: Picks the inputs out of a batch, where that is ambiguous.
        max_batches: The most batches to run; None for all.
        latency_runs: The number of timed calls of float models and programs, on one example or on the batch size that a stage
            is made for; 0 for none.
        progress: Show progress bars.

    Returns:
        The figures: ``print`` shows a table, ``to_json()`` gives all.

    Raises:
        QuantflowError: at stage ``"verify"``, when a stage or the data can't be used, or a stage returns other outputs than
            the first; at the stage at fault, when one does not run.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> x = torch.randn(1, 3, 8, 8)
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
        >>> result = qf.quantize(model, (x,), [torch.randn(4, 3, 8, 8)], recover=False, progress=False)
        >>> stages = {"float": model, "int8": result.graph, ".pte": result.program}
        >>> found = qf.verify(stages, [torch.randn(4, 3, 8, 8)], latency_runs=0, progress=False)
        >>> found[".pte"].delegates, found[".pte"].output.sqnr_db > 20
        ({'XnnpackBackend': 1}, True)
    """
    if not isinstance(stages, Mapping) or not stages:
        remedy = 'pass them by name, as {"float": model, "pte": program}'
        raise QuantflowError("verify", "no stages", node="stages", remedy=remedy)
    running = [Stage.of(name, subject) for name, subject in stages.items()]
    tallies = [Tally() for _ in running]
    kept = [Outcomes() for _ in running] if metric is not None else []
    counts: list[int] = []  # examples of each batch
    first = None  # the first batch, kept for the latency measurement
    total = count_of(data, max_batches, stage="verify")
    with contextlib.ExitStack() as modes:
        for stage in running:
            modes.enter_context(stage.mode())
        states = _states(running)
        begins = [_to_first_state(stage) for stage in running]
        feed = itertools.islice(_batches(data, running, inputs), max_batches)
        for batch in tqdm(feed, desc="verify", total=total, unit="batch", disable=not progress, leave=False):
            found = []
            for stage, state, begin in zip(running, states, begins, strict=True):
                with state():
                    if batch.begins:
                        begin()
                    found.append(_copied(stage(batch.args, batch.kwargs)))
            target = _copied(batch.target)
            for index, (stage, output) in enumerate(zip(running, found, strict=True)):
                tallies[index].add(stage.name, output, found[0], found[max(index - 1, 0)], target)
                if kept:
                    kept[index].add(output, target)
            counts.append(rows_of((batch.args, batch.kwargs), target, found[0]) or 1)
            first = first or batch
        if first is None:
            raise QuantflowError("verify", "there is no data", node="data", remedy="pass at least one batch")
        structured = _structured(running)
        timed = [
            _latency(stage, structured, first, counts[0], latency_runs)
            for stage in tqdm(running, "latency", disable=not progress, leave=False)
        ]
    if metric is None and first.target is not None and not tallies[0].scored:
        reason = "the targets are no classes of any output: there is no accuracy"
        warnings.warn(QuantflowWarning("verify", reason, node="data", remedy="pass metric=..."), stacklevel=2)
    values: list[float | None]
    if metric is not None:
        name, values = getattr(metric, "__name__", "metric"), [k.score(metric) for k in kept]
    else:
        name, values = "top-1" if tallies[0].scored else None, [tally.top1 for tally in tallies]
    figures = zip(running, tallies, values, timed, strict=True)
    return Verification(tuple(_figures(*row, first=row[0] is running[0]) for row in figures), sum(counts), name)


def _batches(data: Iterable[object], stages: list[Stage], inputs: PickInputs | None) -> Iterator[Batch]:
    """``data`` split into inputs and targets by the stage that knows most about its inputs."""
    structured = _structured(stages)
    eager = next((s for s in stages if s.signature is None), None)
    if structured is not None or eager is None:
        signature = structured or stages[0].signature
        assert signature is not None
        return taken_apart(data, signature, stage="verify", inputs=inputs)
    needed, names = eager.names()
    if inputs is None and isinstance(data, Iterable) and not isinstance(data, (torch.Tensor, str, bytes)):
        data = (_by_name(raw, names) if isinstance(raw, Mapping) else raw for raw in data)
    return taken_apart(data, flat_signature(needed), stage="verify", inputs=inputs)


def _structured(stages: list[Stage]) -> Signature | None:
    """The signature of the first stage that knows the structure of its inputs."""
    return next((s.signature for s in stages if s.signature is not None and s.signature.in_spec is not None), None)


def _by_name(raw: Mapping[str, object], names: list[str]) -> tuple[dict[str, Any], Any]:
    return {name: raw[name] for name in names if name in raw}, raw.get("labels")


def _states(stages: list[Stage]) -> list[Callable[[], contextlib.AbstractContextManager[None]]]:
    """For each stage, a context manager that gives its calls their own state if another stage writes into the same memory."""
    states = [None if stage.module is None else OwnState(stage.module) for stage in stages]
    others = [[other for other in states if other is not None and other is not state] for state in states]
    return [
        state.present if state is not None and any(map(state.shares, theirs)) else contextlib.nullcontext
        for state, theirs in zip(states, others, strict=True)
    ]


def _to_first_state(stage: Stage) -> Callable[[], None]:
    """A function that gives ``stage`` the state that it has now."""
    if stage.reset is not None:
        return stage.reset
    assert stage.module is not None
    return OwnState(stage.module).put_back


def _copied(tree: Any) -> Any:
    """A copy on the CPU that later calls of a stage or a loader do not change."""
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().to("cpu", copy=True), tree)


def _latency(stage: Stage, structured: Signature | None, batch: Batch, examples: int, runs: int) -> Latency | None:
    if not runs or stage.kind not in (FLOAT, PTE):
        return None
    args, kwargs, rows = one_call(stage.signature or structured, batch.args, batch.kwargs, examples)
    threads = runtime.threads() if stage.kind == PTE else torch.get_num_threads()
    return latency.measure(lambda: stage(args, kwargs), rows=rows, threads=threads, runs=runs)


def _figures(stage: Stage, tally: Tally, metric: float | None, timed: Latency | None, *, first: bool) -> StageFigures:
    outputs = tally.figures(first=first)
    if stage.contents is None:
        return StageFigures(stage.name, stage.kind, outputs, metric, stage.bytes, timed)
    method = stage.contents.methods["forward"]
    return StageFigures(
        stage.name,
        stage.kind,
        outputs,
        metric,
        stage.bytes,
        timed,
        sum(method.planned_bytes),
        dict(method.delegates),
        dict(method.kernels),
    )
