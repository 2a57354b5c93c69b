"""The accuracy of PTQ: float, stock PT2E, NNCF and quantflow on the same images, on the runtime where programs run.

    python benchmarks/accuracy.py --models resnet18 --calibration calib/ --validation val/ --limit 16    # a smoke run
    python benchmarks/accuracy.py --calibration calib/ --validation val/ --models mobilenet_v2 efficientnet_lite0 --weights A B

A model is any torchvision classifier, or ``efficientnet_lite0`` (its class is in PyPI's ``efficientnet-lite-pytorch``) with
weights from a file. Folders are as for ``recipes/ptq_imagenet.py``. ``converted`` and ``fake-quantized`` are simulated in
PyTorch, ``.pte`` ran on the ExecuTorch runtime. The drop is in points, paired by image, with its 95 % interval; SQNR is that of
the logits. Seconds are wall time with images in memory: ``calibrate``, and ``quantize`` from export to the converted graph.
All tools have their default settings; NNCF is skipped if it is not installed. Prints one table and writes JSON.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from classifiers import beside_float, network, parse_classifiers, print_table
from peers import nncf_quantized, stock_calibrate, stock_lowered, stock_prepared
from record import write_record
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

import quantflow as qf
from quantflow.malloc import keep_freed_memory
from quantflow.vision.images import first, labelled_folder
from quantizers import W4A8, XNNPACKQuantizer

Images = list[torch.Tensor]  # batches, float32 [batch, 3, size, size]
COLUMNS = ("model", "tool", "on", "top1", "drop", "agreement", "sqnr_db", "calibrate_s", "quantize_s", "bytes", "error")


@dataclass(frozen=True)
class Quantized:
    """The result of a tool: a callable for each stage, and the seconds of its steps."""

    stages: dict[str, Callable[..., torch.Tensor]]
    seconds: dict[str, float]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--batch-size", type=int, default=25)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/accuracy.json"))
    return parse_classifiers(parser)


def by_stock(model: nn.Module, example: tuple[torch.Tensor], images: Images) -> Quantized:
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    start = time.perf_counter()
    prepared = stock_prepared(model, example)
    begun = time.perf_counter()
    stock_calibrate(prepared, images)
    calibrated = time.perf_counter()
    converted = convert_pt2e(prepared)
    seconds = {"calibrate": calibrated - begun, "quantize": time.perf_counter() - start}
    return Quantized({"converted": converted, ".pte": stock_lowered(converted, example)}, seconds)


def by_nncf(model: nn.Module, example: tuple[torch.Tensor], images: Images) -> Quantized:
    start = time.perf_counter()
    converted = nncf_quantized(model, example, images)
    seconds = {"quantize": time.perf_counter() - start}
    return Quantized({"converted": converted, ".pte": stock_lowered(converted, example)}, seconds)


def by_quantflow(model: nn.Module, example: tuple[torch.Tensor], images: Images) -> Quantized:
    return quantflow_with(XNNPACKQuantizer(), model, example, images)


def by_quantflow_w4a8(model: nn.Module, example: tuple[torch.Tensor], images: Images) -> Quantized:
    """4-bit weights per channel, simulated: the delegate would store them in 8 bits."""
    made = quantflow_with(XNNPACKQuantizer(W4A8), model, example, images)
    return Quantized({"converted": made.stages["converted"]}, made.seconds)


def quantflow_with(
    quantizer: XNNPACKQuantizer, model: nn.Module, example: tuple[torch.Tensor], images: Images
) -> Quantized:
    """The default steps of ``qf.quantize`` one by one, to keep the fake-quantized stage."""
    start = time.perf_counter()
    prepared = qf.prepare(qf.export(model, example, dynamic_batch=True).module(), quantizer)
    sample = qf.Sample()
    begun = time.perf_counter()
    qf.calibrate(prepared, images, sample=sample)
    calibrated = time.perf_counter()
    recovered = qf.recover(prepared, sample).graph
    converted = qf.convert(recovered)
    seconds = {"calibrate": calibrated - begun, "quantize": time.perf_counter() - start}
    program = qf.export(converted, example).to_core_aten().to_edge("xnnpack").to_executorch()
    return Quantized({"fake-quantized": recovered, "converted": converted, ".pte": program}, seconds)


TOOLS: dict[str, Callable[..., Quantized]] = {
    "stock": by_stock,
    "nncf": by_nncf,
    "quantflow": by_quantflow,
    "quantflow W4A8": by_quantflow_w4a8,
}


def measure(name: str, weights: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one model: float, and each stage of each tool."""
    model, transform = network(name, weights, options)
    example = (torch.zeros(1, 3, options.image_size, options.image_size),)
    calibration = first(labelled_folder(options.calibration, transform), options.limit)
    validation = first(labelled_folder(options.validation, transform), options.limit)
    images = [x for x, _ in tqdm(DataLoader(calibration, options.batch_size), desc="calibration images", leave=False)]
    runs: dict[tuple[str, str], Callable[..., torch.Tensor]] = {("float", "PyTorch"): model}
    rows: list[dict[str, Any]] = [{"model": name, "tool": "float", "on": "PyTorch"}]
    for tool in tqdm(options.tools, desc=name):
        if tool == "nncf" and find_spec("nncf") is None:
            tqdm.write("nncf: not installed, skipped (pip install nncf)")
            continue
        try:
            made = TOOLS[tool](model, example, images)
            for stage, run in made.stages.items():
                if stage != "fake-quantized":  # it would observe the example
                    run(*example)  # finds a stage that does not run before an hour of scoring
        except Exception as error:  # a tool may fail on a model; the others are still measured
            rows.append(
                {"model": name, "tool": tool, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
            )
            continue
        for stage, run in made.stages.items():
            row = {"model": name, "tool": tool, "on": stage}
            row |= {f"{verb}_s": round(taken, 1) for verb, taken in made.seconds.items()}
            row |= {"bytes": len(run.buffer)} if isinstance(run, qf.Program) else {}
            rows.append(row)
            runs[tool, stage] = run
    stages = {f"{tool} {stage}": run for (tool, stage), run in runs.items()}
    found = qf.verify(stages, DataLoader(validation, options.batch_size), latency_runs=0)
    for row in rows:
        if "error" in row:
            continue
        output = found[f"{row['tool']} {row['on']}"].output
        row |= {"images": found.examples, "top1": round(output.top1 or 0.0, 6)}
        if output.drop is not None:
            row |= beside_float(output)
    return rows


def main() -> None:
    options = parse_arguments()
    keep_freed_memory()
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", qf.QuantflowWarning)
    rows: list[dict[str, Any]] = []
    for name, weights in zip(options.models, options.weights, strict=True):
        rows += measure(name, weights, options)
        write_record(options.json, options, rows)  # after each model, in case the next one fails
    print_table(rows, COLUMNS)


if __name__ == "__main__":
    try:
        main()
    except qf.QuantflowError as error:
        sys.exit(f"error: {error}")
