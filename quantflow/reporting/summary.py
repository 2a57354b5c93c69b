"""The summary of a report: accuracy, size and latency."""

from __future__ import annotations

from collections.abc import Iterator

from quantflow.evaluation import Verification
from quantflow.reporting.markup import Markup, element
from quantflow.reporting.parts import Parts


def summary(parts: Parts) -> Markup:
    """The result in one sentence, and the main figures."""
    tone, said = _verdict(parts)
    tiles = [
        element("div", element("dt", name), element("dd", figure, element("small", note)))
        for name, figure, note in _tiles(parts)
    ]
    return element("section", element("p", said, class_=f"verdict {tone}"), element("dl", *tiles, class_="tiles"))


def _verdict(parts: Parts) -> tuple[str, str]:
    """The result as ``"good"``, ``"bad"`` or ``"open"`` (no criterion was given), and its sentence."""
    budget = parts.built.accuracy_control if parts.built is not None else None
    if budget is not None:
        what = "accuracy" if budget.labelled else "agreement with float"
        lost = f"{what} drops by {budget.drop:.2%} on the runtime, where {budget.max_drop:.2%} may be lost."
        return ("good", f"The budget holds: {lost}") if budget.holds else ("bad", f"The budget does not hold: {lost}")
    verification = parts.verification
    if verification is None or len(verification.stages) < 2:
        return "open", "Not verified against float: what it costs in accuracy is not known here."
    first, last = verification.stages[0], verification.stages[-1]
    compared, figures = f"{last.name} against {first.name}, {verification.examples:,} examples", last.output
    if figures.drop is not None and figures.drop_interval is not None:
        lost = f"{figures.drop:.2f} ± {figures.drop_interval:.2f} points of top-1"
        if figures.drop > figures.drop_interval:
            return "bad", f"Accuracy is lost: {lost} ({compared})."
        return "good", f"No loss that so many examples can show: {lost} ({compared})."
    if figures.agreement is not None:
        return "open", f"The same class on {figures.agreement:.2%} ({compared})."
    return "open", f"{figures.sqnr_db or 0:.1f} dB signal to noise ({compared})."


def _tiles(parts: Parts) -> Iterator[tuple[str, str, str]]:
    """Name, figure and note of each tile."""
    if parts.verification is not None:
        yield from _verified(parts.verification)
    elif parts.program is not None:
        yield "Size", in_bytes(len(parts.program.buffer)), ".pte"
    if parts.plan is not None and parts.plan.operators:
        operators = parts.plan.operators
        yield (
            "Integers",
            f"{sum(f.integers is not None for f in operators)} of {len(operators)}",
            "operators, as planned",
        )
    delegation = parts.program.delegation if parts.program is not None else None
    if delegation is not None:
        calls = f"of operators, in {delegation.calls} call{'s' if delegation.calls != 1 else ''}"
        yield "Delegated", f"{delegation.fraction:.0%}", calls
    if parts.built is not None:
        yield "Time", f"{sum(parts.built.seconds.values()):.0f} s", "from export to program"


def _verified(verification: Verification) -> Iterator[tuple[str, str, str]]:
    first, last = verification.stages[0], verification.stages[-1]
    compared = last is not first
    if last.metric is not None:
        metric = verification.metric or "metric"
        shown = "{:.2%}".format if metric == "top-1" else "{:.4g}".format
        before = f"{first.name}: {shown(first.metric)}" if compared and first.metric is not None else ""
        yield metric.capitalize(), shown(last.metric), before
    if last.output.agreement is not None:
        yield "Agreement", f"{last.output.agreement:.2%}", f"same class as {first.name}"
    if last.output.sqnr_db is not None:
        yield "Signal to noise", f"{last.output.sqnr_db:.1f} dB", f"outputs against {first.name}"
    if last.bytes is not None:
        before = f"{last.bytes / first.bytes:.0%} of {in_bytes(first.bytes)}" if compared and first.bytes else ""
        yield "Size", in_bytes(last.bytes), before
    if last.latency is not None:
        was = first.latency if compared else None
        before = f"{first.name}, {first.kind}: {was.median_ms:.2f} ms" if was is not None else "median"
        yield "Latency", f"{last.latency.median_ms:.2f} ms", before


def in_bytes(count: int) -> str:
    """``1_234_567`` as ``1.23 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"
