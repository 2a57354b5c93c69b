"""The graph: what becomes of each operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from quantflow.delegates.delegation import Delegation
from quantflow.reporting.markup import Markup, details, element, section, table

_LARGE = 40  # operators of one group that are still read at a glance


class Fate(Protocol):
    """One row of a plan, as ``quantizers`` tells it."""

    layer: str
    node: str
    operators: tuple[str, ...]
    integers: str | None
    portable: bool
    reason: str

    @property
    def becomes(self) -> str:
        """In integers, in float, and where it runs."""


def graph(fates: Sequence[Fate]) -> Markup:
    """Every operator as a cell, in the order of the graph; then tables by module."""
    counts = Counter(fate.becomes for fate in fates)
    keys = {fate.becomes: _kind(fate) for fate in fates}
    legend = (
        element("li", element("i", class_=keys[name]), f"{name}: {count}") for name, count in counts.most_common()
    )
    cells = (element("i", class_=_kind(fate), title=_told(fate)) for fate in fates)
    groups = grouped(fates)
    return section(
        "The graph",
        element("div", *cells, class_="cells", role="img", aria_label="each operator, in the order of the graph"),
        element("ul", *legend, class_="legend"),
        *(_group(name, members) for name, members in groups.items()),
    )


def grouped(fates: Iterable[Fate]) -> dict[str, list[Fate]]:
    """By the first part of the layer's name, or by two parts where that makes groups too large to read."""
    fates = list(fates)
    sizes = Counter(fate.layer.split(".")[0] for fate in fates)
    groups: dict[str, list[Fate]] = {}
    for fate in fates:
        parts = fate.layer.split(".")
        name = ".".join(parts[: 2 if sizes[parts[0]] > _LARGE else 1])
        groups.setdefault(name or "the model itself", []).append(fate)
    return groups


def _group(name: str, members: list[Fate]) -> Markup:
    floating = sum(fate.integers is None for fate in members)
    count = f"{len(members)} operator{'s' if len(members) != 1 else ''}"
    state = "all in integers" if not floating else f"{floating} in float"
    rows = [["layer", "node", "operators", "becomes", "why"]]
    rows += [[f.layer or "-", f.node, " + ".join(f.operators), f.becomes, f.reason] for f in members]
    return details(f"{name} · {count}, {state}", table(rows), opened=0 < floating < len(members) <= _LARGE)


def _kind(fate: Fate) -> str:
    return "portable" if fate.portable else "float" if fate.integers is None else "integers"


def _told(fate: Fate) -> str:
    why = f" ({fate.reason})" if fate.reason else ""
    return f"{fate.layer or fate.node}: {' + '.join(fate.operators)} → {fate.becomes}{why}"


def lowered(delegation: Delegation) -> Markup:
    """Who runs the operators of the program."""
    runs: list[tuple[str, Any]] = [
        ("delegate", delegation.delegated),
        ("delegate, in float", delegation.floating),
        ("executorch's own kernels", delegation.portable),
    ]
    rows = [["run by", "operator", "count"]]
    rows += [[who, name, str(count)] for who, counts in runs for name, count in counts.most_common()]
    said = f"{delegation.fraction:.1%} of operators delegated, in {delegation.calls} calls."
    if not delegation.portable:
        said += " Nothing is left outside."
    return section("The program", element("p", said, class_="note"), details("All operators", table(rows)))
