"""``quantflow sensitivity``: the quantization noise that each layer of an image classifier causes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from quantflow.cli.options import COUNT, calibration_options, float_options, image_options, model_options, skip_option
from quantflow.cli.output import json_option, show

_EXAMPLES = (
    "\b\nExamples:\n"
    "  quantflow sensitivity --model mobilenet_v2 --weights w.pth --calibration calib/ --validation val/\n"
    "  quantflow sensitivity --model model.pt2 --trust --data digits --json\n"
)


@click.command(epilog=_EXAMPLES)
@model_options(required=True)
@calibration_options
@image_options
@float_options
@skip_option
@click.option("--batches", type=COUNT, default=4, show_default=True, help="Batches of at most 8 images to measure on.")
@json_option
def sensitivity(
    model: str,
    weights: str | None,
    trust: bool,
    calibration: Path | None,
    calibration_images: int,
    float_epochs: int | None,
    save_float: Path | None,
    lr: float,
    skip: tuple[str, ...],
    batches: int,
    as_json: bool,
    **images: Any,
) -> None:
    """SQNR of the outputs with one layer at a time in integers, and with all but one; the most sensitive layer first.

    Measured in simulation on a sample of the images of --validation, of the held-out part of --data, or of the calibration
    images. Pass the first layers of the table to --skip of `quantflow ptq`.
    """
    import quantflow as qf
    from quantflow.cli.chosen_images import ChosenImages
    from quantflow.cli.float_model import float_model
    from quantflow.pipeline.default_quantizer import default_quantizer

    chosen = ChosenImages(**images)
    start = float_model(model, weights, trust, chosen, float_epochs=float_epochs, lr=lr, save_float=save_float)
    shown = start.calibration(chosen.to_calibrate(calibration), calibration_images, chosen.batch_size)
    graph = qf.export(start.network, start.example, dynamic_batch=start.rows is None).module().eval()
    prepared, sample = qf.prepare(graph, default_quantizer("xnnpack", skip=skip)), qf.Sample()
    qf.calibrate(prepared, shown, sample=sample)
    scored = chosen.to_score()
    held_out = None if scored is None else start.calibration(scored.dataset, None, chosen.batch_size)
    show(qf.sensitivity(prepared, sample if held_out is None else held_out, batches=batches), as_json)
