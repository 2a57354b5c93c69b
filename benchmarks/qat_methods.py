"""The gain of distillation and learned step size: PTQ and four QAT methods with equal steps, over several seeds.

    python benchmarks/qat_methods.py                    # MobileNetV2 on handwritten digits, three seeds, W4A8 and W8A8

Each seed trains one float model, from which all methods start, with the same calibration, steps and order of data. Accuracy,
cross-entropy and agreement with float are those of the converted graph (simulated) on the held-out images. Writes JSON and
prints one table.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from record import write_record
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import models
from tqdm import tqdm

import quantflow as qf
from quantflow.malloc import keep_freed_memory
from quantflow.vision.images import digits, first
from quantizers import INT8, W4A8, Scheme, XNNPACKQuantizer

SCHEMES = {"W8A8": INT8, "W4A8": W4A8}
METHODS = ("PTQ", "QAT", "QAT + distillation", "QAT + features", "QAT + LSQ")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--float-epochs", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=3, help="epochs of QAT for each method")
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/qat_methods.json"))
    return parser.parse_args()


def quantized(
    method: str,
    scheme: Scheme,
    teacher: qf.TrainableGraphModule,
    data: DataLoader,
    calibration: DataLoader,
    epochs: int,
) -> torch.nn.Module:
    """The converted graph of ``method``, starting from ``teacher``."""
    fake_quantize = qf.LearnedStepSize if method == "QAT + LSQ" else qf.FakeQuantize
    graph = qf.prepare(teacher, XNNPACKQuantizer(scheme), qat=method != "PTQ", fake_quantize=fake_quantize)
    qf.calibrate(graph, calibration, progress=False)
    distill = {
        "QAT + distillation": qf.Distillation(teacher, weight=0.5),
        "QAT + features": qf.Distillation(teacher, weight=0.5, features=("features.6", "features.13", "features.18")),
    }.get(method)
    if method != "PTQ":
        qf.train(graph, data, epochs=epochs, lr=0.005, distill=distill)
    return qf.convert(graph)


def main() -> None:
    options = parse_arguments()
    keep_freed_memory()
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in tqdm(range(options.seeds), desc="seeds"):
        torch.manual_seed(seed)
        data = digits(options.image_size, seed)
        loader = DataLoader(data.train, 32, shuffle=True, drop_last=True, generator=torch.Generator())
        model = models.get_model("mobilenet_v2", num_classes=data.classes)
        example = (torch.zeros(1, 3, options.image_size, options.image_size),)
        teacher = qf.export(model, example, dynamic_batch=True).module()
        optimizer = torch.optim.SGD(teacher.parameters(), 0.05, momentum=0.9, weight_decay=1e-4, nesterov=True)
        steps = options.float_epochs * len(loader)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
        qf.train(teacher, loader, epochs=options.float_epochs, optimizer=optimizer, scheduler=scheduler, seed=seed)
        calibration = DataLoader(first(data.train, 256), 32)
        graphs: dict[str, torch.nn.Module] = {"float": teacher}
        for name in tqdm(options.schemes, desc="schemes", leave=False):
            for method in tqdm(METHODS, desc=name, leave=False):
                scheme = SCHEMES[name]
                graphs[f"{name} {method}"] = quantized(method, scheme, teacher, loader, calibration, options.epochs)
        found = qf.verify(graphs, DataLoader(data.held_out, 50), metric=F.cross_entropy, latency_runs=0)
        for stage in found.stages:
            row = {
                "accuracy": stage.output.top1 or 0.0,
                "cross_entropy": stage.metric or 0.0,
                "agreement": 1.0 if stage.output.agreement is None else stage.output.agreement,
            }
            rows.setdefault(stage.name, []).append(row)
        report(options, rows)


def report(options: argparse.Namespace, rows: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{'':<26}{'accuracy: mean (each seed)':<40}{'cross-entropy':>14}{'agreement':>11}")
    for name, seeds in rows.items():
        mean = {key: statistics.mean(s[key] for s in seeds) for key in seeds[0]}
        each = f"{mean['accuracy']:.4f} ({', '.join(format(s['accuracy'], '.4f') for s in seeds)})"
        print(f"{name:<26}{each:<40}{mean['cross_entropy']:>14.4f}{mean['agreement']:>11.4f}")
    write_record(options.output, options, rows)


if __name__ == "__main__":
    main()
