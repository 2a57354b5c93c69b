"""``quantflow doctor``: whether this environment can do what quantflow does, and what to install."""

from __future__ import annotations

import click

from quantflow.cli.exit_codes import CHECK_FAILED
from quantflow.cli.output import json_option, show


@click.command()
@click.option("--runtime/--no-runtime", default=True, help="Also start the ExecuTorch runtime.")
@json_option
def doctor(runtime: bool, as_json: bool) -> None:
    """Versions that work together, backends and kernels of the runtime, and what to install. Exit code 1: something lacks."""
    from quantflow.inspection.environment import examine

    found = examine(runtime=runtime)
    show(found, as_json)
    if found.problems:
        raise SystemExit(CHECK_FAILED)
