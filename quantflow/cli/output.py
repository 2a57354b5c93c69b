"""The output of commands: a table or JSON."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Protocol

import click

from quantflow.cli.options import writable
from quantflow.errors import QuantflowError

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


output_option = click.option("--output", type=writable(".pte"), required=True, help="The .pte file to write.")


def _can_draw(context: click.Context, parameter: click.Parameter, page: Path | None) -> Path | None:
    """Check for matplotlib, which the page needs, before anything is computed."""
    if page is not None and find_spec("matplotlib") is None:
        remedy = "pip install 'quantflow[plots]'"
        raise QuantflowError("report", "its pictures need matplotlib", node=f"--report {page}", remedy=remedy)
    return page


report_option = click.option(
    "--report", "page", type=writable(".html"), callback=_can_draw, help="Also write an HTML report, with .json."
)


class _Result(Protocol):
    def to_json(self) -> str: ...


def show(result: _Result, as_json: bool) -> None:
    """Print ``result`` as text or JSON."""
    click.echo(result.to_json() if as_json else str(result))
