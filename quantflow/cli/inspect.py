"""``quantflow inspect``: what a ``.pte`` holds."""

from __future__ import annotations

from pathlib import Path

import click

from quantflow.cli.exit_codes import CHECK_FAILED
from quantflow.cli.output import json_option, show


@click.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--load/--no-load", default=True, help="Load it and run it on zeros, in a process of its own.")
@json_option
def inspect(program: Path, load: bool, as_json: bool) -> None:
    """Methods, inputs, delegates, kernels and memory of the .pte file PROGRAM, from anywhere.

    The file is not trusted: it is read in plain Python and loaded in a process of its own. Exit code 1: the runtime does not
    take it.
    """
    from quantflow.inspection.inspect import inspect as look

    found = look(program, load=load)
    show(found, as_json)
    if found.refused:
        raise SystemExit(CHECK_FAILED)
