"""The HTML document: its frame and the order of its sections."""

from __future__ import annotations

from importlib.resources import files

from quantflow import __version__
from quantflow.inspection.environment import Environment
from quantflow.reporting.building import built, trained
from quantflow.reporting.markup import Markup, element, joined, section, table
from quantflow.reporting.measurements import diagnosed, layer_costs, verified
from quantflow.reporting.operator_plans import graph, lowered
from quantflow.reporting.parts import Parts
from quantflow.reporting.summary import summary


def page(parts: Parts) -> str:
    """The whole document."""
    style = (files(__package__) / "style.css").read_text()
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", parts.title),
        element("style", Markup(style)),
    )
    made = f"quantflow {__version__} · {parts.made}"
    header = element("header", element("h1", parts.title), element("p", made, class_="note"))
    body = element("body", element("main", header, *_sections(parts)))
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _sections(parts: Parts) -> list[Markup]:
    delegation = parts.program.delegation if parts.program is not None else None
    shown = [
        summary(parts),
        verified(parts.verification) if parts.verification is not None else None,
        built(parts.built) if parts.built is not None else None,
        trained(parts.history) if parts.history is not None else None,
        diagnosed(parts.diagnosis) if parts.diagnosis is not None and parts.diagnosis.layers else None,
        layer_costs(parts.sensitivities) if parts.sensitivities is not None and parts.sensitivities.layers else None,
        graph(parts.plan.operators) if parts.plan is not None else None,
        lowered(delegation) if delegation is not None else None,
        _origin(parts.command, parts.environment),
    ]
    return [part for part in shown if part is not None]


def _origin(command: str, environment: Environment) -> Markup:
    """The command and the versions of the environment."""
    rows = [["package", "version", "needs"]]
    rows += [[p.name, p.found or "not installed", p.needed or "any"] for p in environment.packages]
    return section(
        "Command and environment",
        element("div", element("pre", element("code", command)), class_="scroll", tabindex="0")
        if command
        else joined(()),
        element("p", f"Python {environment.python}", class_="note"),
        table(rows),
        *(element("p", problem, class_="note") for problem in environment.problems),
    )
