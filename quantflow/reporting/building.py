"""Report sections on training, recovery, accuracy control and the time of each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence

from quantflow.analysis import AccuracyControl
from quantflow.pipeline.result import Report
from quantflow.reporting.charts import Bar, bars, curves
from quantflow.reporting.markup import Markup, element, section, table
from quantflow.training import History


def built(report: Report) -> Markup:
    """The section on :func:`quantflow.quantize`."""
    pictures = []
    measured = [] if report.recovered is None else [s for s in report.recovered.steps if not math.isnan(s.sqnr)]
    if measured:
        steps = [Bar(s.name, s.sqnr, f"{s.sqnr:.1f} dB" + ("" if s.kept else ", not kept")) for s in measured]
        pictures.append(bars("built-recovery", "Signal to noise after each step of recovery, simulated", steps))
    if report.seconds:
        times = [Bar(stage, seconds, f"{seconds:.1f} s") for stage, seconds in report.seconds.items()]
        pictures.append(bars("built-seconds", "Seconds by stage", times))
    control = report.accuracy_control
    controlled = _accuracy_control(control) if control is not None else []
    return section("Quantization", *controlled, element("div", *pictures, class_="pictures"))


def _accuracy_control(control: AccuracyControl) -> list[Markup]:
    tried = [["layers in float", "drop"], *([str(count), f"{drop:.2%}"] for count, drop in control.tried)]
    parts = [element("h3", "Programs measured on the runtime"), table(tried)]
    if control.reverted:
        rows = [["in float", "why"], *([r.layer, r.reason] for r in control.reverted)]
        parts += [element("h3", "Left in float to hold the budget"), table(rows)]
    return parts


def trained(history: History) -> Markup:
    """The section on training."""
    pictures = [curves("training-loss", "Training loss", {"loss": history.loss}, "epoch")] if history.loss else []
    scores: dict[str, Sequence[float]] = {"fake-quantized": history.metric, "converted": history.converted_metric}
    scores = {name: values for name, values in scores.items() if values}
    if scores:
        pictures.append(curves("training-metric", "Metric", scores, "epoch"))
    kept = "the last epoch's" if history.best_epoch is None else f"those of epoch {history.best_epoch + 1}"
    return section(
        "Training", element("p", f"Weights kept: {kept}.", class_="note"), element("div", *pictures, class_="pictures")
    )
