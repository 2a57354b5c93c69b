"""``quantflow qat``: quantization-aware training of an image classifier to a ``.pte``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from quantflow.cli.options import COUNT, float_options, image_options, model_options, skip_option
from quantflow.cli.output import json_option, output_option, show
from quantflow.errors import QuantflowError

_SELECTION = 0.1  # of the training images: what the best state is chosen by, PTQ's among them
_EXAMPLES = (
    "\b\nExamples:\n"
    "  quantflow qat --model mobilenet_v2 --data digits --output model.pte\n"
    "  quantflow qat --model resnet18 --weights resnet18.pth --data photos/ --image-size 224 --output model.pte\n"
)


@click.command(epilog=_EXAMPLES)
@model_options(required=True)
@image_options
@float_options
@click.option(
    "--scheme", type=click.Choice(["w8a8", "w4a8"]), default="w8a8", show_default=True, help="Weights, activations."
)
@click.option("--epochs", type=COUNT, default=3, show_default=True, help="Epochs of quantization-aware training.")
@click.option("--labels", is_flag=True, help="Learn from the labels as well, not from the float model alone.")
@click.option(
    "--calibration-images", type=COUNT, default=500, show_default=True, help="Images for PTQ, where QAT starts."
)
@skip_option
@output_option
@json_option
def qat(
    model: str,
    weights: str | None,
    trust: bool,
    float_epochs: int | None,
    save_float: Path | None,
    lr: float,
    scheme: str,
    epochs: int,
    labels: bool,
    calibration_images: int,
    skip: tuple[str, ...],
    output: Path,
    as_json: bool,
    **images: Any,
) -> None:
    """Train an image classifier with QAT, starting from PTQ, lower it to XNNPACK, and compare the .pte with both."""
    from torch.nn import functional as F

    import quantflow as qf
    from quantflow.cli.chosen_images import ChosenImages
    from quantflow.cli.float_model import float_model, loader_of
    from quantflow.cli.result import Made
    from quantflow.pipeline.default_quantizer import default_quantizer
    from quantflow.vision.images import held_out

    start_time = time.perf_counter()
    chosen = ChosenImages(**images)
    if chosen.to_learn is None:
        raise QuantflowError("data", "nothing to train on", node="--data", remedy="--data digits, or a folder")
    data, selection = held_out(chosen.to_learn.train, _SELECTION, chosen.seed)
    start = float_model(model, weights, trust, chosen, float_epochs=float_epochs, lr=lr, save_float=save_float)
    teacher = qf.export(start.network, start.example, dynamic_batch=start.rows is None).module().eval()
    quantizer = default_quantizer("xnnpack", scheme=scheme, skip=skip)
    prepared = qf.prepare(teacher, quantizer, qat=True)
    sample = qf.Sample(calibration_images)
    qf.calibrate(prepared, start.calibration(data, calibration_images, chosen.batch_size), sample=sample)
    graph = qf.recover(prepared, sample).graph
    ptq = qf.convert(graph)
    chosen_by = start.calibration(selection, None, chosen.batch_size)
    qf.train(
        graph,
        loader_of(data, start.rows or chosen.batch_size),
        epochs=epochs,
        loss=F.cross_entropy if labels else None,
        validate=qf.Accuracy(chosen_by) if labels else qf.Fidelity(teacher, chosen_by),
        seed=chosen.seed,
    )
    converted = qf.convert(graph)
    program = qf.export(converted, start.example).to_core_aten().to_edge("xnnpack").to_executorch()
    program.save(output)
    stages = {"float": teacher, "PTQ": ptq, "fake-quantized": graph, "converted": converted, output.name: program}
    scored = chosen.to_score()
    figures = None if scored is None else qf.verify(stages, scored)
    assert program.delegation is not None  # it was lowered here
    seconds = {"all": round(time.perf_counter() - start_time, 1)}
    show(Made(str(output), str(program.delegation), seconds, program.delegation.fraction, figures), as_json)
