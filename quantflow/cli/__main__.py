"""``python -m quantflow.cli``, for environments whose scripts are not on the path."""

from quantflow.cli import main

main(prog_name="quantflow")
