"""The classifiers that benchmarks of accuracy take: their arguments, networks, figures and table."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quantflow as qf
from quantflow.evaluation.figures import OutputFigures
from quantflow.vision.images import preprocessing
from quantflow.vision.models import classifier, load_weights, read_weights


def parse_classifiers(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line with, besides what ``parser`` has, networks, their weights and folders of images."""
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2"])
    parser.add_argument("--weights", nargs="+", type=Path, help="one per model: a file or a torchvision name")
    parser.add_argument("--calibration", type=Path, required=True, help="images to calibrate on")
    parser.add_argument("--validation", type=Path, required=True, help="images to score on")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--resize", action="store_true", help="scale the shorter side, then crop")
    parser.add_argument("--limit", type=int, help="number of images of each folder")
    options = parser.parse_args()
    options.weights = options.weights or [Path("DEFAULT")] * len(options.models)
    if len(options.weights) != len(options.models):
        parser.error(f"{len(options.models)} models and {len(options.weights)} weights: name one for each model")
    return options


def network(name: str, weights: Path, options: argparse.Namespace) -> tuple[nn.Module, Callable[[Any], torch.Tensor]]:
    """The float model with its weights, and its image transform."""
    if name != "efficientnet_lite0":
        return classifier(name, None, str(weights)).eval(), preprocessing(options.image_size, resize=options.resize)
    try:
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        remedy = "pip install efficientnet-lite-pytorch"
        raise qf.QuantflowError(
            "recipe", "its class is not installed", node=f"--models {name}", remedy=remedy
        ) from error
    model = EfficientNet.from_name("efficientnet-lite0")
    load_weights(model, read_weights(weights), str(weights))
    transform = preprocessing(options.image_size, resize=options.resize, mean=[127 / 255] * 3, std=[128 / 255] * 3)
    return model.eval(), transform


def beside_float(output: OutputFigures) -> dict[str, float]:
    """The figures of a stage beside the float network, rounded for a record."""
    return {
        "drop": round(output.drop or 0.0, 3),
        "drop_interval": round(output.drop_interval or 0.0, 3),
        "agreement": round(output.agreement or 0.0, 6),
        "sqnr_db": round(output.sqnr_db or 0.0, 3),
    }


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Print ``rows`` as a table of those ``columns`` that any row has."""
    shown = [column for column in columns if any(column in row for row in rows)]
    print("| " + " | ".join(shown) + " |\n|" + "---|" * len(shown))
    for row in rows:
        print("| " + " | ".join(cell(row, column) for column in shown) + " |")


def cell(row: dict[str, Any], column: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if column == "drop":
        return f"{value:.2f} ± {row['drop_interval']:.2f}"
    if column in ("top1", "agreement", "frozen"):
        return f"{100 * value:.2f} %"
    return f"{value:,}" if isinstance(value, int) else f"{value:.1f}" if isinstance(value, float) else str(value)
