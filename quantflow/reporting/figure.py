"""Figures as inline SVG that uses the colors of the page, light or dark."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from quantflow.errors import QuantflowError
from quantflow.reporting.markup import Markup, element

# matplotlib needs colors and the page has CSS variables: each of these colors is replaced by a variable.
INK, MUTED, FIRST, SECOND, BAD = (f"#0{i}0{i}0{i}" for i in range(1, 6))
_VARIABLES = {INK: "ink", MUTED: "muted", FIRST: "first", SECOND: "second", BAD: "bad"}
_WIDTH = 4.8  # inches: text stays readable on a phone
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, accessible, in the font of the page
    "text.parse_math": False,  # user names may contain "$", which is not a formula
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class Picture:
    """A figure to draw on: :attr:`figure` is matplotlib's, :meth:`markup` returns the HTML."""

    def __init__(self, name: str, caption: str, height: float) -> None:
        from matplotlib.figure import Figure

        self.name, self.caption = name, caption
        self.figure: Any = Figure(figsize=(_WIDTH, height), layout="constrained")

    def markup(self) -> Markup:
        """The figure with its caption above it."""
        file = io.StringIO()
        self.figure.savefig(file, format="svg", transparent=True)
        return element("figure", element("figcaption", self.caption), _inline(file.getvalue(), self.name))


@contextmanager
def picture(name: str, caption: str, height: float) -> Iterator[Picture]:
    """A figure to draw on, ``height`` inches high; ``name`` is unique on the page.

    Raises:
        QuantflowError: at stage ``"report"``, if matplotlib is missing.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        remedy = 'pip install "quantflow[plots]"'
        raise QuantflowError("report", "matplotlib is not installed", node="plots", remedy=remedy) from error
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        yield Picture(name, caption, height)


def _inline(svg: str, name: str) -> Markup:
    """The ``<svg>`` element without prologue, URLs and size, with ids that are unique on the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 role="img">', svg, count=1)
    used = set(re.findall(r"#([\w-]+)\)|href=\"#([\w-]+)\"", svg))
    kept = {one or other for one, other in used}
    svg = re.sub(r' id="([\w-]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in kept else "", svg)
    svg = re.sub(r"url\(#([\w-]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([\w-]+)"', rf'href="#{name}-\1"', svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return Markup(svg)
