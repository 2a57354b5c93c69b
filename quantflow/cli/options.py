"""Options shared by several commands."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

C = TypeVar("C", bound=Callable)

PATH = click.Path(path_type=Path)
COUNT = click.IntRange(1)


class writable(click.Path):  # noqa: N801  named like click's argument types
    """A file to write. Its suffix and folder are checked before anything is computed."""

    def __init__(self, ending: str) -> None:
        super().__init__(path_type=Path, dir_okay=False, writable=True)
        self.ending = ending

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> Any:
        path = Path(str(super().convert(value, parameter, context)))
        if path.suffix != self.ending:
            self.fail(f"{path} does not end in {self.ending}", parameter, context)
        if not os.access(path.resolve().parent, os.W_OK):
            self.fail(f"{path.resolve().parent} is no folder that can be written to", parameter, context)
        return path


def options(*several: Callable[[C], C]) -> Callable[[C], C]:
    """One decorator for ``several`` options, in this order in the help."""

    def decorate(command: C) -> C:
        for option in reversed(several):
            command = option(command)
        return command

    return decorate


def model_options(*, required: bool) -> Callable[[C], C]:
    """The options of the float model."""
    return options(
        click.option("--model", required=required, help="A torchvision classifier by name, or a .pt2 file."),
        click.option("--weights", help="A .pth or .safetensors file, or torchvision weights by name."),
        click.option("--trust", is_flag=True, help="Open a .pt2 file, which can run code."),
    )


calibration_options = options(
    click.option("--calibration", type=PATH, help="A folder to calibrate on. [default: the training part of --data]"),
    click.option("--calibration-images", type=COUNT, default=500, show_default=True),
)

skip_option = click.option(
    "--skip", multiple=True, metavar="LAYER", help="A layer to leave in float, by name; may be repeated."
)

image_options = options(
    click.option("--data", help="digits, an image folder, or a torchvision data set by name."),
    click.option("--data-root", type=PATH, default="data", help="Where torchvision data sets are kept."),
    click.option("--validation", type=PATH, help="A folder to score on: one folder per class, or a labels.csv."),
    click.option(
        "--image-size", type=COUNT, help="Pixels a side. [default: a given program's; else 64 with --data, 224]"
    ),
    click.option("--resize", is_flag=True, help="Images of --validation and --calibration: scale, then crop."),
    click.option("--mean", type=float, nargs=3, help="Channel means for these folders. [default: ImageNet's]"),
    click.option("--std", type=float, nargs=3, help="Likewise."),
    click.option("--images", "most", type=COUNT, help="Number of images to score on. [default: all]"),
    click.option("--batch-size", type=COUNT, default=32, show_default=True),
    click.option(
        "--seed", type=int, default=0, show_default=True, help="Seed of the held-out part of --data and of training."
    ),
)

float_options = options(
    click.option("--float-epochs", type=click.IntRange(0), help="Train in float first. [default: 9 without --weights]"),
    click.option("--save-float", type=writable(".safetensors"), help="Also write the float weights (.safetensors)."),
    click.option("--lr", type=float, default=0.05, show_default=True, help="Peak learning rate in float."),
)
