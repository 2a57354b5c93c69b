"""How commands show a result: as a table for people, or as JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import click

from quantflow.cli.options import writable

json_option: Callable[..., Any] = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")


output_option: Callable[..., Any] = click.option(
    "--output", type=writable(".pte"), required=True, help="The .pte file to write."
)


class _Result(Protocol):
    def to_json(self) -> str: ...


def show(result: _Result, as_json: bool) -> None:
    """Print ``result``."""
    click.echo(result.to_json() if as_json else str(result))
