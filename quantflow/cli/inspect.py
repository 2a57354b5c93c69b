"""``quantflow inspect``: the contents of a ``.pte`` file."""

from __future__ import annotations

from pathlib import Path

import click

from quantflow.cli.exit_codes import CHECK_FAILED
from quantflow.cli.output import json_option, show


@click.command()
@click.argument("program", type=click.Path(path_type=Path))
@click.option("--load/--no-load", default=True, help="Load the program and run it on zeros, in a separate process.")
@json_option
def inspect(program: Path, load: bool, as_json: bool) -> None:
    """Methods, inputs, delegates, kernels and memory of the .pte file PROGRAM, from any source.

    The file is not trusted: it is parsed in plain Python and loaded in a separate process. Exit code 1: the runtime rejects
    it.
    """
    from quantflow.inspection.inspect import inspect as look

    found = look(program, load=load)
    show(found, as_json)
    if found.refused:
        raise SystemExit(CHECK_FAILED)
