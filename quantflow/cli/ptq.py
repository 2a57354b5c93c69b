"""``quantflow ptq``: post-training quantization of an image classifier to a ``.pte``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantflow.cli.options import calibration_options, float_options, image_options, model_options, skip_option
from quantflow.cli.output import json_option, output_option, report_option, show

_EXAMPLES = (
    "\b\nExamples:\n"
    "  quantflow ptq --model mobilenet_v2 --weights w.pth --calibration calib/ --validation val/ --output model.pte\n"
    "  quantflow ptq --model mobilenet_v2 --data digits --output model.pte    (no weights: trained in float first)\n"
)


@click.command(epilog=_EXAMPLES)
@model_options(required=True)
@calibration_options
@image_options
@float_options
@skip_option
@click.option("--recover/--no-recover", default=True, help="Recover accuracy after calibration.")
@click.option(
    "--max-drop",
    type=click.FloatRange(0, 100),
    metavar="POINTS",
    help="Leave layers in float until no more points of accuracy are lost on half of the images to score on; the other half "
    "is scored.",
)
@output_option
@report_option
@json_option
def ptq(
    model: str,
    weights: str | None,
    trust: bool,
    calibration: Path | None,
    calibration_images: int,
    float_epochs: int | None,
    save_float: Path | None,
    lr: float,
    skip: tuple[str, ...],
    recover: bool,
    max_drop: float | None,
    output: Path,
    page: Path | None,
    as_json: bool,
    **images: Any,
) -> None:
    """Quantize a trained image classifier, lower it to XNNPACK, and compare the .pte with the float model."""
    from quantflow import quantize, verify
    from quantflow import report as write_report
    from quantflow.cli.chosen_images import ChosenImages
    from quantflow.cli.float_model import float_model
    from quantflow.cli.result import Made
    from quantflow.pipeline.default_quantizer import default_quantizer
    from quantflow.vision.images import count_of

    chosen = ChosenImages(**images)
    scored, chosen_by = chosen.to_score(), None
    if max_drop is not None and (halves := chosen.to_choose_and_score()) is not None:
        chosen_by, scored = halves
    start = float_model(model, weights, trust, chosen, float_epochs=float_epochs, lr=lr, save_float=save_float)
    shown = chosen.to_calibrate(calibration)
    batches = start.calibration(shown, calibration_images, chosen.batch_size)
    result = quantize(
        start.network,
        start.example,
        batches,
        quantizer=default_quantizer("xnnpack", skip=skip),
        dynamic_batch=start.rows is None,
        recover=recover,
        max_drop=None if max_drop is None else max_drop / 100,
        validation=chosen_by,
    )
    result.program.save(output)
    stages = {"float": start.network, "converted": result.graph, output.name: result.program}
    figures = None if scored is None else verify(stages, scored)
    if page is not None:
        write_report(page, title=model, result=result, verification=figures)
    report = result.report
    told_by = None if chosen_by is None else count_of(chosen_by.dataset)
    show(Made(str(output), str(report), report.seconds, report.delegated_fraction, figures, told_by), as_json)
