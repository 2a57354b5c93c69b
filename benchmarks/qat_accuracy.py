"""QAT of trained classifiers on real images: PTQ, QAT by several methods, and stock PT2E QAT with equal steps.

    python benchmarks/qat_accuracy.py --models mobilenet_v2 efficientnet_lite0 --weights A B \
        --calibration calib/ --training train/ --validation val/

Each method starts from the same float network, for each scheme and seed, and is scored on the same validation images: converted
(simulated in PyTorch) and, of W8A8, the ``.pte`` on the ExecuTorch runtime. A row that ``--json`` has already is not measured
again, so that the benchmark can be run in parts. Folders and models are as for ``benchmarks/accuracy.py``. PTQ sees the
calibration images. QAT trains on the training and the calibration images, of which a tenth is held out to choose the best
state; "calibration images" trains on these alone, without labels. Minutes are wall time from the captured graph on; methods
that start from the same calibrated graph share it, and each counts its minutes.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch
from classifiers import beside_float, network, parse_classifiers, print_table
from peers import stock_lowered, stock_qat
from record import write_record
from torch import nn
from torch.nn import functional as F
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from tqdm import tqdm

import quantflow as qf
from quantflow.malloc import keep_freed_memory
from quantflow.vision.images import first, held_out, labelled_folder
from quantizers import XNNPACKQuantizer

COLUMNS = (
    "model",
    "scheme",
    "method",
    "seed",
    "on",
    "top1",
    "drop",
    "agreement",
    "sqnr_db",
    "minutes",
    "frozen",
    "kept",
)


@dataclass
class Starts:
    """The calibrated graphs of a network and a scheme, which several methods start from, and the seconds that each took.

    Attributes:
        made: The graphs and seconds, by what was asked for.
        reused: The seconds that reused graphs had taken, since it was last set to zero.
    """

    made: dict[tuple[bool, str], tuple[qf.TrainableGraphModule, float]] = field(default_factory=dict)
    reused: float = 0.0

    def graph(self, key: tuple[bool, str], make: Callable[[], qf.TrainableGraphModule]) -> qf.TrainableGraphModule:
        """A copy of the graph at ``key``, which ``make`` makes the first time."""
        if key in self.made:
            self.reused += self.made[key][1]
        else:
            start = time.perf_counter()
            self.made[key] = make(), time.perf_counter() - start
        return copy.deepcopy(self.made[key][0])


@dataclass(frozen=True)
class Task:
    """A float network, a scheme, and the images to calibrate and to train on."""

    model: nn.Module
    example: tuple[torch.Tensor]
    scheme: str
    calibration: Dataset
    training: Dataset
    seed: int
    options: argparse.Namespace
    starts: Starts

    def loader(self, images: Dataset, *, shuffle: bool) -> DataLoader:
        random = torch.Generator()
        return DataLoader(images, self.options.batch_size, shuffle=shuffle, drop_last=shuffle, generator=random)


@dataclass(frozen=True)
class Made:
    """What a method made: the converted graph, what trained it, and how it is lowered."""

    converted: nn.Module
    history: qf.History | None = None
    lower: Callable[[Any, Any], Any] = lambda converted, example: (
        qf.export(converted, example).to_core_aten().to_edge("xnnpack").to_executorch()
    )


def calibrated(task: Task, *, recover: bool, fake_quantize: type = qf.FakeQuantize) -> qf.TrainableGraphModule:
    def make() -> qf.TrainableGraphModule:
        graph = qf.export(task.model, task.example, dynamic_batch=True).module().eval()
        prepared = qf.prepare(graph, XNNPACKQuantizer(task.scheme), qat=True, fake_quantize=fake_quantize)
        sample = qf.Sample(task.options.calibration_images)
        qf.calibrate(prepared, task.loader(task.calibration, shuffle=False), sample=sample)
        return qf.recover(prepared, sample).graph if recover else prepared.eval()

    return task.starts.graph((recover, fake_quantize.__name__), make)


def trained(task: Task, graph: qf.TrainableGraphModule, images: Dataset, **how: Any) -> Made:
    """``graph`` trained on ``images``; the best state on a tenth of them, the start included, is kept."""
    fit, selection = held_out(images, 0.1, task.seed)
    validate = qf.Fidelity(task.model, task.loader(selection, shuffle=False))
    loader = task.loader(fit, shuffle=True)
    history = qf.train(graph, loader, epochs=task.options.epochs, validate=validate, seed=task.seed, **how)
    return Made(qf.convert(graph), history)


def ptq(task: Task) -> Made:
    return Made(qf.convert(calibrated(task, recover=False)))


def recovered(task: Task) -> Made:
    return Made(qf.convert(calibrated(task, recover=True)))


def plain(task: Task) -> Made:
    """From raw ranges, with labels, SGD and the usual schedule."""
    return trained(task, calibrated(task, recover=False), task.training, lr=task.options.lr)


def teacher(task: Task) -> Made:
    """As :func:`plain`, towards the float network instead of labels."""
    distill = qf.Distillation(task.model, weight=1.0)
    return trained(task, calibrated(task, recover=False), task.training, lr=task.options.lr, distill=distill)


def default(task: Task) -> Made:
    return trained(task, calibrated(task, recover=True), task.training)


def unfrozen(task: Task) -> Made:
    """The default with weights that may oscillate."""
    from quantflow.training.fine_tuning import fine_tuning

    graph = calibrated(task, recover=True)
    fit, _ = held_out(task.training, 0.1, task.seed)
    optimizer, scheduler = fine_tuning(graph, task.options.epochs * len(task.loader(fit, shuffle=True)))
    optimizer.freeze = 1.0
    return trained(task, graph, task.training, optimizer=optimizer, scheduler=scheduler)


def lsq(task: Task) -> Made:
    return trained(task, calibrated(task, recover=True, fake_quantize=qf.LearnedStepSize), task.training)


def unlabelled(task: Task) -> Made:
    return trained(task, calibrated(task, recover=True), task.calibration)


def stock(task: Task) -> Made:
    """Stock PT2E QAT: labels, SGD with a cosine, observers and batch norm as stock leaves them; the last state."""
    from torchao.quantization.pt2e import move_exported_model_to_eval, move_exported_model_to_train
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    torch.manual_seed(task.seed)
    prepared = move_exported_model_to_train(stock_qat(task.model, task.example, bits=int(task.scheme[1])))
    loader = task.loader(held_out(task.training, 0.1, task.seed)[0], shuffle=True)
    optimizer = torch.optim.SGD(prepared.parameters(), task.options.lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.options.epochs * len(loader))
    for _ in range(task.options.epochs):
        for x, target in tqdm(loader, desc="stock", leave=False):
            optimizer.zero_grad()
            F.cross_entropy(prepared(x), target).backward()
            optimizer.step()
            scheduler.step()
    return Made(convert_pt2e(move_exported_model_to_eval(prepared)), lower=stock_lowered)


METHODS: dict[str, Callable[[Task], Made]] = {
    "PTQ": ptq,
    "PTQ, recovered": recovered,
    "QAT": default,
    "QAT, calibration images": unlabelled,
    "QAT, LSQ": lsq,
    "QAT, not frozen": unfrozen,
    "QAT, plain": plain,
    "QAT, plain, teacher": teacher,
    "stock QAT": stock,
}
_SEEDLESS = ("PTQ", "PTQ, recovered")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--training", type=Path, required=True, help="more images for QAT")
    parser.add_argument("--schemes", nargs="+", default=["w8a8", "w4a8"], choices=("w8a8", "w4a8"))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3, help="of SGD, for the plain methods and stock")
    parser.add_argument("--calibration-images", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/qat_accuracy.json"))
    return parse_classifiers(parser)


def measure(task: Task, method: str, validation: Dataset) -> list[dict[str, Any]]:
    """The rows of one method: of the converted graph, and of the program where the scheme has one."""
    task.starts.reused, start = 0.0, time.perf_counter()
    made = METHODS[method](task)
    minutes = (time.perf_counter() - start + task.starts.reused) / 60
    stages: dict[str, Callable[..., Any]] = {"converted": made.converted}
    if task.scheme == "w8a8":
        stages[".pte"] = made.lower(made.converted, task.example)
    images = task.loader(validation, shuffle=False)
    found = qf.verify({"float": task.model, **stages}, images, latency_runs=0)
    rows = []
    for stage in stages:
        output = found[stage].output
        row: dict[str, Any] = {"on": stage, "images": found.examples, "minutes": round(minutes, 1)}
        row |= {"top1": round(output.top1 or 0.0, 6), **beside_float(output)}
        if made.history is not None:
            row |= {"kept": "start" if made.history.best_epoch == -1 else f"epoch {(made.history.best_epoch or 0) + 1}"}
            if made.history.frozen_weights:
                row["frozen"] = round(made.history.frozen_weights[-1], 4)
        rows.append(row)
    return rows


def main() -> None:
    options = parse_arguments()
    keep_freed_memory()
    warnings.simplefilter("ignore")
    warnings.simplefilter("default", qf.QuantflowWarning)
    rows: list[dict[str, Any]] = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    for name, weights in zip(options.models, options.weights, strict=True):
        model, transform = network(name, weights, options)
        calibration, training, validation = (
            first(labelled_folder(folder, transform), options.limit)
            for folder in (options.calibration, options.training, options.validation)
        )
        example = (torch.zeros(1, 3, options.image_size, options.image_size),)
        starts = {scheme: Starts() for scheme in options.schemes}
        for scheme, method, seed in product(options.schemes, options.methods, options.seeds):
            key = {"model": name, "scheme": scheme, "method": method, "seed": seed}
            if method in _SEEDLESS and seed != options.seeds[0]:
                continue
            if any(key.items() <= row.items() for row in rows):
                continue
            print(" ".join(map(str, key.values())), flush=True)
            both: Dataset = ConcatDataset([training, calibration])
            task = Task(model, example, scheme, calibration, both, seed, options, starts[scheme])
            rows += [key | row for row in measure(task, method, validation)]
            write_record(options.json, options, rows)
    print_table(rows, COLUMNS)


if __name__ == "__main__":
    try:
        main()
    except qf.QuantflowError as error:
        sys.exit(f"error: {error}")
