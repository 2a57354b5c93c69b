"""The cost of calibration: quantflow and stock PT2E, relative to the float model's forward over the same batches.

    python benchmarks/calibration.py                    # MobileNetV2, 16 batches of 8 at 224×224: ratios to float
    python benchmarks/calibration.py --model resnet18 --batches 32 --repeats 3

Seconds are process time on one thread; the variants alternate, and ratios are of medians. Each repeat calibrates a fresh
copy, and ``batches`` is the number of batches it read. ``convert`` is measured once, since a tool may compute ranges there.
Peak memory is the growth of the resident set over 4 and over 16 batches, each in a separate process. Writes JSON and prints
one table.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fresh_process import in_fresh_process, peak_growth
from peers import stock_calibrate, stock_prepared
from record import write_record
from torch import nn
from torchvision import models
from tqdm import tqdm

import quantflow as qf
from quantizers import XNNPACKQuantizer

MEMORY_BATCHES = (4, 16)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2", help="any torchvision classification model, random weights")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=5, help="counted calibrations of each variant")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/calibration.json"))
    return parser.parse_args()


def float_model(model: nn.Module, example: tuple[torch.Tensor]) -> nn.Module:
    return model


def quantflow_prepared(model: nn.Module, example: tuple[torch.Tensor]) -> nn.Module:
    return qf.prepare(qf.export(model, example, dynamic_batch=True).module(), XNNPACKQuantizer())


@torch.no_grad()
def forward(model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    for batch in batches:
        model(batch)


def convert_stock(prepared: nn.Module) -> None:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    convert_pt2e(prepared)


# For each variant, the functions that build, calibrate and convert it.
VARIANTS: dict[str, tuple[Callable[..., nn.Module], Callable[..., Any], Callable[..., Any] | None]] = {
    "float": (float_model, forward, None),
    "quantflow": (quantflow_prepared, partial(qf.calibrate, progress=False), qf.convert),
    "stock": (stock_prepared, stock_calibrate, convert_stock),
    "stock, min-max": (partial(stock_prepared, min_max=True), stock_calibrate, convert_stock),
}


class Counted:
    """Batches with a count of how many were read."""

    def __init__(self, batches: list[torch.Tensor]) -> None:
        self.batches, self.taken = batches, 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for batch in self.batches:
            self.taken += 1
            yield batch


def built(name: str, options: argparse.Namespace) -> nn.Module:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = models.get_model(options.model, weights=None).eval()
    return VARIANTS[name][0](model, (torch.zeros(1, 3, options.image_size, options.image_size),))


def random_batches(options: argparse.Namespace, count: int) -> list[torch.Tensor]:
    return [torch.randn(options.batch_size, 3, options.image_size, options.image_size) for _ in range(count)]


def peak_bytes(name: str, options: argparse.Namespace, count: int) -> int:
    """The growth of this process while the variant ``name`` reads ``count`` batches, bytes."""
    model, batches = built(name, options), random_batches(options, count)
    return peak_growth(lambda: VARIANTS[name][1](model, batches))


def seconds(work: Callable[..., Any], *args: Any) -> float:
    start = time.process_time()
    work(*args)
    return time.process_time() - start


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    rows: dict[str, dict[str, float]] = {}
    for name in tqdm(VARIANTS, desc="memory"):
        growth = {count: in_fresh_process(peak_bytes, name, options, count) for count in MEMORY_BATCHES}
        rows[name] = {f"peak_bytes_{count}": grown for count, grown in growth.items()}
    pristine = {name: built(name, options) for name in VARIANTS}
    batches = random_batches(options, options.batches)
    for name, model in pristine.items():  # warm up
        VARIANTS[name][1](copy.deepcopy(model), batches[:2])
    taken: dict[str, list[float]] = {name: [] for name in VARIANTS}
    last: dict[str, nn.Module] = {}
    for _ in tqdm(range(options.repeats), desc="repeats"):
        for name, model in pristine.items():
            last[name], data = copy.deepcopy(model), Counted(batches)
            taken[name].append(seconds(VARIANTS[name][1], last[name], data))
            rows[name]["batches"] = data.taken
    for name, (_, _, convert) in VARIANTS.items():
        rows[name]["calibrate_s"] = statistics.median(taken[name])
        rows[name]["ratio"] = statistics.median(taken[name]) / statistics.median(taken["float"])
        if convert is not None:
            rows[name]["convert_s"] = seconds(convert, last[name])
    return rows


def main() -> None:
    options = parse_arguments()
    rows = measure(options)
    megabytes = " | ".join(f"MB, {count} batches" for count in MEMORY_BATCHES)
    print(f"| | ratio to float | calibrate, s | batches | convert, s | {megabytes} |\n|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        convert = f"{row['convert_s']:.2f}" if "convert_s" in row else ""
        memory = " | ".join(f"{row[f'peak_bytes_{count}'] / 1e6:.0f}" for count in MEMORY_BATCHES)
        print(f"| {name} | {row['ratio']:.2f} | {row['calibrate_s']:.2f} | {row['batches']} | {convert} | {memory} |")
    write_record(options.json, options, rows)


if __name__ == "__main__":
    main()
