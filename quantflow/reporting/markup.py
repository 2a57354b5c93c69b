"""HTML elements; text is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

_VOID = {"meta", "br"}
_FIGURE = re.compile(r"[-+]?(\d|inf\b|nan\b).*|-?")


class Markup(str):
    """HTML that is not escaped again. Any other string is text, and is escaped."""


def element(name: str, /, *children: str, **attributes: str) -> Markup:
    """``<name ...>children</name>``. An attribute that is a Python keyword is written with a trailing underscore."""
    shown = "".join(f' {key.rstrip("_").replace("_", "-")}="{html.escape(value)}"' for key, value in attributes.items())
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{joined(children)}</{name}>")


def joined(parts: Iterable[str]) -> Markup:
    """The concatenation of ``parts``, escaped where they are text."""
    return Markup("".join(part if isinstance(part, Markup) else html.escape(part) for part in parts))


def table(rows: Sequence[Sequence[str]]) -> Markup:
    """A table: a row of headings, then rows of cells, figures right-aligned. It scrolls on narrow pages."""
    head, *body = rows
    figures = [all(_FIGURE.fullmatch(row[i]) for row in body) and any(row[i] for row in body) for i in range(len(head))]
    kinds = [{"class_": "figure"} if figure else {} for figure in figures]
    lines = [element("tr", *(element("th", c, scope="col", **kind) for c, kind in zip(head, kinds, strict=True)))]
    lines += [element("tr", *(element("td", c, **kind) for c, kind in zip(row, kinds, strict=True))) for row in body]
    return element(
        "div",
        element("table", element("thead", lines[0]), element("tbody", *lines[1:])),
        class_="scroll",
        tabindex="0",  # allows scrolling by keyboard
    )


def details(summary: str, *children: str, opened: bool = False) -> Markup:
    """A collapsible ``<details>`` element."""
    return element("details", element("summary", summary), *children, **({"open": ""} if opened else {}))


def section(title: str, *children: str) -> Markup:
    """A section of the page."""
    return element("section", element("h2", title), *children)
