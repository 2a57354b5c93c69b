"""``quantflow doctor``: checks the environment, and names the packages to install."""

from __future__ import annotations

import click

from quantflow.cli.exit_codes import CHECK_FAILED
from quantflow.cli.output import json_option, show


@click.command()
@click.option("--runtime/--no-runtime", default=True, help="Also start the ExecuTorch runtime.")
@json_option
def doctor(runtime: bool, as_json: bool) -> None:
    """Check package versions, and backends and kernels of the runtime; list what to install. Exit code 1: one is missing."""
    from quantflow.inspection.environment import examine

    found = examine(runtime=runtime)
    show(found, as_json)
    if found.problems:
        raise SystemExit(CHECK_FAILED)
