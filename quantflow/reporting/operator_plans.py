"""Report sections on the graph: the plan of each operator, and the delegation of the program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from quantflow.delegates.delegation import Delegation
from quantflow.reporting.markup import Markup, details, element, section, table

_LARGE = 40  # the largest group that is shown opened


class OperatorPlan(Protocol):
    """One row of a plan, as ``quantizers.OperatorPlan`` has it."""

    layer: str
    node: str
    operators: tuple[str, ...]
    integers: str | None
    portable: bool
    reason: str

    @property
    def becomes(self) -> str:
        """Integers or float, and where the operator runs."""


class Plan(Protocol):
    """A plan, as ``quantizers.Plan`` is."""

    @property
    def operators(self) -> Sequence[OperatorPlan]: ...


def graph(operators: Sequence[OperatorPlan]) -> Markup:
    """The section with every operator as a cell, in graph order, then tables by module."""
    counts = Counter(operator.becomes for operator in operators)
    keys = {operator.becomes: _kind(operator) for operator in operators}
    legend = (
        element("li", element("i", class_=keys[name]), f"{name}: {count}") for name, count in counts.most_common()
    )
    cells = (element("i", class_=_kind(operator), title=_told(operator)) for operator in operators)
    groups = grouped(operators)
    return section(
        "The graph",
        element("div", *cells, class_="cells", role="img", aria_label="each operator, in the order of the graph"),
        element("ul", *legend, class_="legend"),
        *(_group(name, members) for name, members in groups.items()),
    )


def grouped(operators: Iterable[OperatorPlan]) -> dict[str, list[OperatorPlan]]:
    """Operators grouped by the first part of the layer's name, or by two parts if these groups are too large."""
    operators = list(operators)
    sizes = Counter(operator.layer.split(".")[0] for operator in operators)
    groups: dict[str, list[OperatorPlan]] = {}
    for operator in operators:
        parts = operator.layer.split(".")
        name = ".".join(parts[: 2 if sizes[parts[0]] > _LARGE else 1])
        groups.setdefault(name or "the model itself", []).append(operator)
    return groups


def _group(name: str, members: list[OperatorPlan]) -> Markup:
    floating = sum(operator.integers is None for operator in members)
    count = f"{len(members)} operator{'s' if len(members) != 1 else ''}"
    state = "all in integers" if not floating else f"{floating} in float"
    rows = [["layer", "node", "operators", "becomes", "why"]]
    rows += [[f.layer or "-", f.node, " + ".join(f.operators), f.becomes, f.reason] for f in members]
    return details(f"{name} · {count}, {state}", table(rows), opened=0 < floating < len(members) <= _LARGE)


def _kind(operator: OperatorPlan) -> str:
    return "portable" if operator.portable else "float" if operator.integers is None else "integers"


def _told(operator: OperatorPlan) -> str:
    why = f" ({operator.reason})" if operator.reason else ""
    return f"{operator.layer or operator.node}: {' + '.join(operator.operators)} → {operator.becomes}{why}"


def lowered(delegation: Delegation) -> Markup:
    """The section on delegation: the operators of the program by delegate, float and kernel."""
    runs: list[tuple[str, Counter[str]]] = [
        ("delegate", delegation.delegated),
        ("delegate, in float", delegation.floating),
        ("executorch's own kernels", delegation.portable),
    ]
    rows = [["run by", "operator", "count"]]
    rows += [[who, name, str(count)] for who, counts in runs for name, count in counts.most_common()]
    said = f"{delegation.fraction:.1%} of operators delegated, in {delegation.calls} calls."
    if not delegation.portable:
        said += " No operator is left outside."
    return section("The program", element("p", said, class_="note"), details("All operators", table(rows)))
