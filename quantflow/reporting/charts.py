"""The charts of a report: bars, curves and ranges."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from quantflow.analysis import LayerErrors
from quantflow.reporting.figure import BAD, FIRST, INK, MUTED, SECOND, picture
from quantflow.reporting.markup import Markup

_LONGEST = 38  # characters of a name that fit over a bar


@dataclass(frozen=True)
class Bar:
    """One bar with its name above it and ``shown`` to its right. A value that is not finite has no length."""

    name: str
    value: float | None
    shown: str
    spread: tuple[float, float] | None = None
    bad: bool = False


def bars(name: str, caption: str, given: Sequence[Bar]) -> Markup:
    """A chart of bars from zero, the first on top."""
    with picture(name, caption, 0.15 + 0.44 * len(given)) as drawn:
        axis = drawn.figure.add_subplot()
        over = axis.get_yaxis_transform()  # x in axes fractions, y in bars
        for row, bar in enumerate(given):
            finite = bar.value is not None and math.isfinite(bar.value)
            length = bar.value if finite and bar.value is not None else 0.0
            axis.barh(row + 0.2, length, height=0.24, color=BAD if bar.bad else FIRST)
            if bar.spread is not None:
                axis.hlines(row + 0.2, *bar.spread, color=INK, linewidth=1.2)
            axis.text(0, row - 0.02, shortened(bar.name), transform=over, va="bottom", color=INK)
            axis.text(1, row - 0.02, bar.shown, transform=over, va="bottom", ha="right", color=MUTED)
        middles = [row + 0.2 for row in range(len(given))]
        axis.vlines([0] * len(given), [y - 0.16 for y in middles], [y + 0.16 for y in middles], MUTED, linewidth=0.8)
        axis.set(ylim=(len(given) - 0.5, -0.5))
        axis.axis("off")
        return drawn.markup()


def curves(name: str, caption: str, given: dict[str, Sequence[float]], across: str) -> Markup:
    """A chart of curves over 1, 2, 3, ..., with their names in the legend."""
    with picture(name, caption, 2.4) as drawn:
        axis = drawn.figure.add_subplot()
        for (label, values), colour in zip(given.items(), (FIRST, SECOND, BAD), strict=False):
            axis.plot(range(1, len(values) + 1), values, marker="o", markersize=3.5, color=colour, label=label)
        axis.set_xlabel(across)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.legend(frameon=False)
        return drawn.markup()


def ranges(name: str, caption: str, layers: Sequence[LayerErrors]) -> Markup:
    """For each layer, the share of float values in each sixteenth of its integer range, and, in another color, outside it."""
    rows = math.ceil(len(layers) / 2)
    with picture(name, caption, 0.1 + 1.15 * rows) as drawn:
        axes = drawn.figure.subplots(rows, 2, squeeze=False).flatten()
        for axis, found in zip(axes, layers, strict=False):
            total = max(sum(found.histogram), 1)
            last = len(found.histogram) - 1
            colours = [BAD if i in (0, last) else FIRST for i in range(last + 1)]
            axis.bar(range(last + 1), [n / total for n in found.histogram], width=0.86, color=colours)
            axis.set_title(shortened(found.layer or found.node, 22), fontsize=10, loc="left", color=INK)
            axis.set(xlim=(-0.7, last + 0.7), xticks=[0.5, last - 0.5], xticklabels=["low", "high"], yticks=[])
            axis.spines["left"].set_visible(False)
        for axis in axes[len(layers) :]:
            axis.axis("off")
        return drawn.markup()


def shortened(name: str, longest: int = _LONGEST) -> str:
    """``name``, or its end, which distinguishes layers."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= longest else "…" + name[1 - longest :]
