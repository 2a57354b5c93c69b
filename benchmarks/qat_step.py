"""The cost of a step of quantization-aware training: float, quantflow and stock PT2E in one run.

    python benchmarks/qat_step.py                       # MobileNetV2, batch 8, 224×224: ratios to the float step
    python benchmarks/qat_step.py --compile             # also the compiled float and quantflow steps (minutes to compile)

A step is forward and backward. The variants alternate, and ratios are of medians. Peak memory is the growth of the resident
set over two steps, each variant in a separate process. Writes JSON and prints one table.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fresh_process import in_fresh_process, peak_growth
from peers import stock_quantizer
from record import write_record
from torch import nn
from torchvision import models

import quantflow as qf
from quantflow.malloc import keep_freed_memory
from quantizers import XNNPACKQuantizer


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mobilenet_v2")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--steps", type=int, default=7, help="counted steps of each variant")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--keep-freed-memory", action="store_true", help="use quantflow.malloc for all variants")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/qat_step.json"))
    return parser.parse_args()


def float_model(options: argparse.Namespace) -> tuple[nn.Module, dict[str, float]]:
    return models.get_model(options.model, weights=None).train(), {}


def quantflow_model(options: argparse.Namespace) -> tuple[nn.Module, dict[str, float]]:
    graph = qf.export(models.get_model(options.model, weights=None), example(options)).module()
    start = time.perf_counter()
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=True).train()
    return prepared, {"prepare_s": time.perf_counter() - start}


def stock_model(options: argparse.Namespace) -> tuple[nn.Module, dict[str, float]]:
    from torchao.quantization.pt2e import move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import prepare_qat_pt2e

    model = models.get_model(options.model, weights=None).train()
    exported = torch.export.export(model, example(options)).module()
    quantizer = stock_quantizer(qat=True)
    start = time.perf_counter()
    prepared = prepare_qat_pt2e(exported, quantizer)
    seconds = time.perf_counter() - start
    return move_exported_model_to_train(prepared), {"prepare_s": seconds}


VARIANTS = {"float": float_model, "quantflow": quantflow_model, "stock": stock_model}


def example(options: argparse.Namespace) -> tuple[torch.Tensor]:
    return (torch.randn(options.batch_size, 3, options.image_size, options.image_size),)


def step(model: Callable[..., Any], x: torch.Tensor, target: torch.Tensor) -> float:
    start = time.perf_counter()
    nn.functional.cross_entropy(model(x), target).backward()
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def convert_seconds(name: str, model: nn.Module) -> float:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    start = time.perf_counter()
    convert: Callable[..., nn.Module] = qf.convert if name == "quantflow" else convert_pt2e
    convert(model)
    return time.perf_counter() - start


def peak_bytes(name: str, options: argparse.Namespace) -> int:
    """The growth of this process over two steps of the variant ``name``, bytes."""
    model, _ = VARIANTS[name](options)
    (x,), target = example(options), torch.zeros(options.batch_size, dtype=torch.long)
    return peak_growth(lambda: [step(model, x, target) for _ in range(2)])


def main() -> None:
    options = parse_arguments()
    if options.keep_freed_memory:
        keep_freed_memory()
    torch.manual_seed(0)
    rows: dict[str, dict[str, float]] = {}
    peaks = {name: in_fresh_process(peak_bytes, name, options) for name in VARIANTS} if options.device == "cpu" else {}
    eager: dict[str, nn.Module] = {}
    for name, build in VARIANTS.items():
        eager[name], rows[name] = build(options)
        eager[name].to(options.device)
    built: dict[str, Callable[..., Any]] = {**eager}
    if options.compile:
        for name in ("float", "quantflow"):
            built[f"{name} compiled"], rows[f"{name} compiled"] = torch.compile(eager[name]), {}
    x, target = example(options)[0].to(options.device), torch.zeros(options.batch_size, dtype=torch.long)
    target = target.to(options.device)
    for model in built.values():  # warm up, and compile
        step(model, x, target)
        step(model, x, target)
    times: dict[str, list[float]] = {name: [] for name in built}
    for _ in range(options.steps):
        for name, model in built.items():
            times[name].append(step(model, x, target))
    for name, peak in peaks.items():
        rows[name].update(peak_bytes=peak, peak_ratio=peak / peaks["float"])
    for name, taken in times.items():
        rows[name]["step_s"] = statistics.median(taken)
        base = "float compiled" if name.endswith("compiled") else "float"
        rows[name]["step_ratio"] = statistics.median(taken) / statistics.median(times[base])
    for name in ("quantflow", "stock"):
        rows[name]["convert_s"] = convert_seconds(name, eager[name])
    report(options, rows)


def report(options: argparse.Namespace, rows: dict[str, dict[str, float]]) -> None:
    columns = ("step_ratio", "peak_ratio", "prepare_s", "convert_s", "step_s")
    print(f"{'':<20}" + "".join(f"{c:>12}" for c in columns))
    for name, row in rows.items():
        print(f"{name:<20}" + "".join(f"{row[c]:>12.2f}" if c in row else f"{'-':>12}" for c in columns))
    write_record(options.output, options, rows)
    print(f"\nwritten: {options.output}")


if __name__ == "__main__":
    main()
