"""``quantflow compare``: the differences of two programs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantflow.cli.exit_codes import CHECK_FAILED
from quantflow.cli.options import COUNT, PATH
from quantflow.cli.output import json_option, show

if TYPE_CHECKING:
    from quantflow import Verification


@dataclass(frozen=True)
class Differences:
    """The differences of two programs.

    Attributes:
        figures: The second program compared with the first, on noise.
        calls: Numbers of calls of delegates and kernels that differ, by name: (first, second).
    """

    figures: Verification
    calls: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, figures: Verification) -> Differences:
        """Count the calls of the two programs in ``figures``."""
        first, second = ({**(stage.delegates or {}), **(stage.kernels or {})} for stage in figures.stages)
        both = {name: (first.get(name, 0), second.get(name, 0)) for name in sorted({*first, *second})}
        return cls(figures, {name: counts for name, counts in both.items() if counts[0] != counts[1]})

    def to_json(self) -> str:
        """All of it, as a JSON object."""
        return json.dumps({"figures": json.loads(self.figures.to_json()), "calls": self.calls}, indent=2)

    def __str__(self) -> str:
        lines = [f"  {name}: {first} and {second}" for name, (first, second) in self.calls.items()]
        return "\n".join([str(self.figures), "calls that differ:" if lines else "the same calls", *lines])


@click.command()
@click.argument("first", type=PATH)
@click.argument("second", type=PATH)
@click.option("--batches", type=COUNT, default=16, show_default=True, help="Batches of noise, shaped for FIRST.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the noise.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Exit code 1 if the SQNR of an output is lower.")
@json_option
def compare(first: Path, second: Path, batches: int, seed: int, min_sqnr: float | None, as_json: bool) -> None:
    """Compare two .pte files from any source: outputs on noise, size, latency, memory, calls.

    For accuracy on images see `quantflow verify`. Each file first runs in a separate process.
    """
    from quantflow import verify
    from quantflow.cli.random_inputs import random_batches
    from quantflow.evaluation import examined

    one, other = examined(first), examined(second)
    figures = verify({"first": one, "second": other}, random_batches(one.signature, batches, seed))
    show(Differences.of(figures), as_json)
    ratios = [output.sqnr_db for output in figures["second"].outputs]
    if min_sqnr is not None and any(ratio is None or not ratio >= min_sqnr for ratio in ratios):
        click.echo(f"failed: the SQNR of an output is below {min_sqnr:g} dB", err=True)
        raise SystemExit(CHECK_FAILED)
