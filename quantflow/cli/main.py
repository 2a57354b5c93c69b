"""The command group, its exit codes, and how errors are shown."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from quantflow import __version__
from quantflow.cli.completion import completion
from quantflow.cli.doctor import doctor
from quantflow.cli.inspect import inspect
from quantflow.errors import QuantflowError

CHECK_FAILED, USAGE, CAN_NOT = 1, 2, 3


class _Commands(click.Group):
    """A group that shows a :class:`QuantflowError` as a message, or as JSON where JSON was asked for."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except QuantflowError as error:
            if "--json" in sys.argv:
                shown = {"stage": error.stage, "node": error.node, "reason": error.reason, "remedy": error.remedy}
                click.echo(json.dumps({"error": shown}, indent=2))
            click.echo(f"error: {error}", err=True)
            context.exit(CAN_NOT)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantflow")
def main() -> None:
    """From PyTorch to a quantized ExecuTorch program, proven on the runtime.

    Exit codes: 0 well; 1 a check failed; 2 the command was not understood; 3 it can't be done (the message says why).
    """


for _command in (inspect, doctor, completion):
    main.add_command(_command)
