"""The command group: subcommands, exit codes and the display of errors."""

from __future__ import annotations

import json
import warnings
from typing import Any

import click

from quantflow import __version__
from quantflow.cli.compare import compare
from quantflow.cli.completion import completion
from quantflow.cli.doctor import doctor
from quantflow.cli.exit_codes import CAN_NOT
from quantflow.cli.inspect import inspect
from quantflow.cli.ptq import ptq
from quantflow.cli.qat import qat
from quantflow.cli.sensitivity import sensitivity
from quantflow.cli.verify import verify
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.malloc import keep_freed_memory


class _Commands(click.Group):
    """A group that prints a :class:`QuantflowError` as a message, or as JSON with ``--json``."""

    def invoke(self, context: click.Context) -> Any:
        as_json = "--json" in context.args
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings of other packages
                warnings.simplefilter("always", QuantflowWarning)
                warnings.showwarning = _show_warning
                return super().invoke(context)
        except QuantflowError as error:
            if as_json:
                shown = {"stage": error.stage, "node": error.node, "reason": error.reason, "remedy": error.remedy}
                click.echo(json.dumps({"error": shown}, indent=2))
            click.echo(f"error: {error}", err=True)
        except ModuleNotFoundError as error:
            click.echo(f"error: {error.name} is not installed: pip install 'quantflow[recipes]'", err=True)
        context.exit(CAN_NOT)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
) -> None:
    """Print warnings to stderr without file and line, which would be those of this package."""
    click.echo(f"warning: {message}", err=True)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantflow")
def main() -> None:
    """From PyTorch to a quantized ExecuTorch program, proven on the runtime.

    Exit codes: 0 success; 1 a check failed; 2 invalid usage; 3 an error (the message states the cause).
    """
    keep_freed_memory()


for _command in (ptq, qat, verify, sensitivity, compare, inspect, doctor, completion):
    main.add_command(_command)
