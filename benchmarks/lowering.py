"""The cost of lowering: quantflow's fast lowering and executorch's passes on the same graph, each in a fresh process.

    python benchmarks/lowering.py                       # MobileNetV2, EfficientNet-B0 and ViT-B/16, int8
    python benchmarks/lowering.py --repeat 3

Measured from the exported converted program to the bytes of the ``.pte``, in seconds of process time on one thread, without
imports. Both use the same partitioner, and the bytes are compared. Writes JSON and prints one table.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from fresh_process import in_fresh_process
from torchvision import models
from tqdm import tqdm


def exported(name: str) -> Any:
    """The converted graph of the model, random weights, exported."""
    import quantflow as qf
    from quantizers import XNNPACKQuantizer

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, x = models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)
    graph = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer())
    return qf.export(qf.convert(qf.calibrate(graph, [x], progress=False)), (x,)).program


def lower(name: str, fast: bool) -> tuple[float, str]:
    """Seconds of process time from the exported program to the bytes, and their digest."""
    torch.set_num_threads(1)
    program = exported(name)
    import executorch.kernels.quantized  # noqa: F401
    from executorch import exir

    from quantflow.delegates import resolve
    from quantflow.upstream.lowering.fast_lowering import fast_lowering

    delegate = resolve("xnnpack")
    partitioners, passes = delegate.partitioners(), delegate.passes()  # imports executorch's XNNPACK
    start = time.process_time()
    with fast_lowering() if fast else contextlib.nullcontext():
        edge = exir.to_edge_transform_and_lower(program, transform_passes=passes, partitioner=partitioners)
        buffer = edge.to_executorch().buffer
    return time.process_time() - start, hashlib.sha256(buffer).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["mobilenet_v2", "efficientnet_b0", "vit_b_16"])
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/lowering.json"))
    options = parser.parse_args()
    rows = []
    for name in tqdm(options.models, desc="models"):
        runs: dict[bool, list[tuple[float, str]]] = {True: [], False: []}
        for _ in range(options.repeat):
            for fast, found in runs.items():
                found.append(in_fresh_process(lower, name, fast))
        seconds = {fast: statistics.median(s for s, _ in found) for fast, found in runs.items()}
        same = len({digest for found in runs.values() for _, digest in found}) == 1
        rows.append({"model": name, "stock_s": seconds[False], "fast_s": seconds[True], "same_bytes": same})
    print("| model | executorch, s | quantflow, s | ratio | same bytes |\n|---|---|---|---|---|")
    for row in rows:
        ratio = row["fast_s"] / row["stock_s"]
        print(f"| {row['model']} | {row['stock_s']:.1f} | {row['fast_s']:.1f} | {ratio:.2f} | {row['same_bytes']} |")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
