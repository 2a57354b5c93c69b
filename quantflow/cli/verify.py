"""``quantflow verify``: compares programs on the runtime with the float model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantflow.cli.exit_codes import CHECK_FAILED
from quantflow.cli.options import PATH, image_options, model_options
from quantflow.cli.output import json_option, report_option, show
from quantflow.errors import QuantflowError

_NOISE = 16  # batches of noise
_EXAMPLES = (
    "\b\nExamples:\n"
    "  quantflow verify model.pte --model mobilenet_v2 --weights w.pth --validation val/ --max-drop 0.5\n"
    "  quantflow verify ours.pte theirs.pte --data digits --json\n"
)


@click.command(epilog=_EXAMPLES)
@click.argument("programs", type=PATH, nargs=-1, required=True)
@model_options(required=False)
@image_options
@click.option("--runs", type=click.IntRange(0), default=30, show_default=True, help="Timed calls; 0 for no latency.")
@click.option(
    "--max-drop", type=float, metavar="POINTS", help="Exit code 1 if a program loses more points of accuracy."
)
@click.option("--min-agreement", type=click.FloatRange(0, 1), help="Exit code 1 if a program agrees on less.")
@report_option
@json_option
def verify(
    programs: tuple[Path, ...],
    model: str | None,
    weights: str | None,
    trust: bool,
    runs: int,
    max_drop: float | None,
    min_agreement: float | None,
    page: Path | None,
    as_json: bool,
    **images: Any,
) -> None:
    """Accuracy, agreement, SQNR, size, latency, memory and delegation of PROGRAMS, .pte files from any source.

    They are compared with the float --model, or with the first program. Without images they run on noise, which gives
    agreement and SQNR but no accuracy. Each file first runs in a separate process.
    """
    import quantflow as qf
    from quantflow.cli import float_model
    from quantflow.cli.chosen_images import ChosenImages
    from quantflow.cli.random_inputs import random_batches
    from quantflow.evaluation import examined

    if model is not None and weights is None and not float_model.is_program(model):
        remedy = "--weights, as `quantflow ptq --save-float` writes them, or a .pt2 file"
        raise QuantflowError("model", "it has no weights to compare with", node=f"--model {model}", remedy=remedy)
    loaded = {str(path): examined(path) for path in programs}
    signature = loaded[str(programs[0])].signature
    chosen = ChosenImages(**images).fitting(signature)
    first = {} if model is None else {"float": float_model.read(model, weights, None, trust=trust)}
    scored = chosen.to_score()
    if scored is None:
        click.echo("no --data or --validation: the inputs are noise, which gives no accuracy", err=True)
    data = random_batches(signature, _NOISE, chosen.seed) if scored is None else scored
    found = qf.verify({**first, **loaded}, data, latency_runs=runs)
    if page is not None:
        only = loaded[str(programs[0])] if len(programs) == 1 else None
        qf.report(page, title=", ".join(path.name for path in programs), program=only, verification=found)
    show(found, as_json)
    failed = []
    for stage in found.stages[1:]:
        drop, agreement = stage.output.drop, stage.output.agreement
        if max_drop is not None and (drop is None or drop > max_drop):
            lost = "accuracy is not known" if drop is None else f"{drop:.2f} points of accuracy are lost"
            failed.append(f"{stage.name}: {lost}")
        if min_agreement is not None and (agreement is None or agreement < min_agreement):
            failed.append(f"{stage.name}: agrees on {'nothing' if agreement is None else format(agreement, '.2%')}")
    for reason in failed:
        click.echo(f"failed: {reason}", err=True)
    if failed:
        raise SystemExit(CHECK_FAILED)
