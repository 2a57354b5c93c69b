"""Report sections on verification, diagnosis and sensitivity."""

from __future__ import annotations

import math

from quantflow.analysis import Diagnosis, Sensitivities
from quantflow.evaluation import Verification
from quantflow.reporting.charts import Bar, bars, ranges
from quantflow.reporting.markup import Markup, details, element, joined, section, table
from quantflow.reporting.summary import in_bytes

_SHOWN = 12  # bars in a figure


def verified(verification: Verification) -> Markup:
    """The section on verification: every stage compared with the first."""
    stages = verification.stages
    pictures = []
    noisy = [(s, s.output.sqnr_db) for s in stages if s.output.sqnr_db is not None]
    if noisy:
        given = [Bar(s.name, db, f"{db:.1f} dB") for s, db in noisy]
        pictures.append(bars("stages-noise", f"Signal to noise against {stages[0].name}: more is better", given))
    sized = [(s, s.bytes) for s in stages if s.bytes is not None]
    if len(sized) > 1:
        given = [Bar(s.name, size, in_bytes(size)) for s, size in sized]
        pictures.append(bars("stages-bytes", "Size: file, or parameters and buffers", given))
    timed = [(s, s.latency) for s in stages if s.latency is not None]
    if len(timed) > 1:
        given = [Bar(s.name, t.median_ms, f"{t.median_ms:.2f} ms", (t.low_ms, t.high_ms)) for s, t in timed]
        pictures.append(bars("stages-latency", "Latency of a call: median, and quartiles as a line", given))
    notes = (element("p", note, class_="note") for note in verification.notes())
    return section("Verification", table(verification.table()), *notes, _side_by_side(pictures))


def diagnosed(diagnosis: Diagnosis) -> Markup:
    """The section on diagnosis: layers by their error."""
    erring = [e for e in diagnosis.layers if math.isfinite(e.excess)]
    first = [Bar(e.layer or e.node, e.excess, f"{e.excess:.1f} dB", bad=e.excess > 3) for e in erring]
    effects = [(e.layer or e.node, e.effect) for e in diagnosis.by_effect() if e.effect is not None]
    most = [Bar(name, effect, f"{effect:.1f} dB") for name, effect in effects if math.isfinite(effect)]
    pictures = [bars("layers-excess", "Error in excess of the expected rounding error, largest first", first[:_SHOWN])]
    if most:
        caption = "Signal to noise of the outputs if this layer alone were quantized, the least first"
        pictures.append(bars("layers-effect", caption, most[:_SHOWN]))
    gridded = [e for e in diagnosis.layers if e.histogram][:6]
    if gridded:
        pictures.append(ranges("layers-ranges", "Float values along the integer range; clipped in red", gridded))
    said = "Ranked by error in excess of the rounding error that the bits of a layer explain. About 0 dB is expected."
    return section(
        "Diagnosis",
        element("p", said, class_="note"),
        _side_by_side(pictures),
        details(f"All {len(diagnosis.layers)} layers", table(diagnosis.table())),
    )


def layer_costs(sensitivities: Sensitivities) -> Markup:
    """The section on sensitivity: the noise that each layer causes."""
    alone = [Bar(c.layer, c.to_integers, f"{c.to_integers:.1f} dB") for c in sensitivities.layers]
    gain = sorted(
        ((c.to_float - sensitivities.all_integers, c.layer) for c in sensitivities.layers), key=lambda g: -g[0]
    )
    pictures = [
        bars("costs-alone", "Signal to noise of the outputs, this layer alone in integers", alone[:_SHOWN]),
        bars(
            "costs-gain",
            "Gained by leaving only this layer in float",
            [Bar(n, g, f"{g:.1f} dB") for g, n in gain[:_SHOWN]],
        ),
    ]
    return section(
        "Sensitivity",
        element("p", f"With every layer in integers: {sensitivities.all_integers:.1f} dB.", class_="note"),
        _side_by_side(pictures),
        details(f"All {len(sensitivities.layers)} layers", table(sensitivities.table())),
    )


def _side_by_side(pictures: list[Markup]) -> Markup:
    return element("div", *pictures, class_="pictures") if pictures else joined(())
