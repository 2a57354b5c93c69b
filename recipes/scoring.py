"""What the recipes measure and how they show it."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from quantflow import Program, QuantflowError
from quantflow.files import write_atomically


@torch.no_grad()
def score(
    models: dict[str, Callable[[torch.Tensor], torch.Tensor]], dataset: Dataset, batch_size: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The outputs of each of ``models`` on every image, [images, classes] by name, and the labels, [images].

    One pass over the data serves all, so that all see the same images. A program runs one image at a time.
    """
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in models}
    targets = []
    for x, y in tqdm(DataLoader(dataset, batch_size), desc="score", unit="batch", leave=False):
        targets.append(y)
        for name, model in models.items():
            batches = x.split(1) if isinstance(model, Program) else (x.to(_device_of(model)),)
            outputs[name] += [model(batch).cpu() for batch in batches]
    return {name: torch.cat(parts) for name, parts in outputs.items()}, torch.cat(targets)


def accuracy(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    """The share of images whose largest output is the label."""
    return round(float((outputs.argmax(1) == targets).double().mean()), 6)


def agreement(a: torch.Tensor, b: torch.Tensor) -> float:
    """The share of images on which both say the same class."""
    return round(float((a.argmax(1) == b.argmax(1)).double().mean()), 6)


def paired_drop(reference: torch.Tensor, approximation: torch.Tensor, targets: torch.Tensor) -> tuple[float, float]:
    """By how many points accuracy falls from ``reference`` to ``approximation``, and half the width of its 95 % interval.

    Both saw the same images, so the interval is that of the mean of the differences image by image, most of which are zero.
    """
    right = [(outputs.argmax(1) == targets).double() for outputs in (reference, approximation)]
    difference = 100 * (right[0] - right[1])
    standard_error = difference.std() / len(difference) ** 0.5
    return round(float(difference.mean()), 3), round(float(1.96 * standard_error), 3)


def sqnr(reference: torch.Tensor, approximation: torch.Tensor) -> float:
    """Signal to quantization noise ratio of the outputs, dB."""
    noise = (reference - approximation).double().pow(2).mean().clamp(min=1e-30)
    return round(float(10 * torch.log10(reference.double().pow(2).mean() / noise)), 3)


def latency_ms(model: Callable[..., Any], x: torch.Tensor, runs: int = 30, warm_up: int = 5) -> float:
    """The median time of a call on one image, milliseconds, after ``warm_up`` calls."""
    times = []
    for _ in range(warm_up + runs):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return round(statistics.median(times[warm_up:]) * 1000, 3)


def output_folder(path: Path) -> Path:
    """``path``, made if need be; checked before anything is computed.

    Raises:
        QuantflowError: at stage ``"recipe"``, when nothing can be written there.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / ".writable", b"", stage="recipe").unlink()
    except (OSError, QuantflowError) as error:
        remedy = "name a folder that you can write to"
        raise QuantflowError("recipe", f"can't write: {error}", node=f"--output {path}", remedy=remedy) from error
    return path


def write_result(folder: Path, result: dict[str, Any]) -> None:
    """Write ``result.json`` and print the table of it."""
    write_atomically(folder / "result.json", (json.dumps(result, indent=2) + "\n").encode(), stage="recipe")
    print()
    print_table((name, value) for name, value in result.items() if not isinstance(value, (dict, list)))
    print(f"\nwritten: {folder / 'model.pte'}, {folder / 'result.json'}")


def print_table(rows: Iterable[tuple[str, Any]]) -> None:
    """Names and figures, in two columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
        print(f"{name:<{width}}  {shown:>14}")


def _device_of(model: Any) -> torch.device:
    parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
    return torch.device("cpu") if parameter is None else parameter.device
