"""The gain of learned rounding for weights of few bits: nearest, AdaRound by layer and by block, over several seeds.

    python benchmarks/rounding.py                       # a small residual network on handwritten digits, three seeds, minutes

Each seed trains one float network, and all variants start from the same calibration. SQNR of the logits and agreement with
float are simulated on the held-out images. Writes JSON and prints one table.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import torch
from record import write_record
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import quantflow as qf
from quantflow.metrics import signal_to_noise
from quantflow.ptq import adaround
from quantflow.simulation.network import outputs
from quantflow.vision.images import digits
from quantizers import Scheme, TensorScheme, XNNPACKQuantizer


class Block(nn.Module):
    """Two convolutions with a skip connection."""

    def __init__(self, given: int, made: int) -> None:
        super().__init__()
        first, second = nn.Conv2d(given, made, 3, made // given, 1), nn.Conv2d(made, made, 3, 1, 1)
        self.body = nn.Sequential(first, nn.BatchNorm2d(made), nn.ReLU(), second, nn.BatchNorm2d(made))
        self.skip = nn.Identity() if made == given else nn.Conv2d(given, made, 1, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.body(x) + self.skip(x))


def network() -> nn.Sequential:
    stem = (nn.Conv2d(3, 16, 3, 1, 1), nn.BatchNorm2d(16), nn.ReLU())
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    return nn.Sequential(*stem, Block(16, 16), Block(16, 32), Block(32, 32), *head)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3], help="bits of the weights; activations have 8")
    parser.add_argument("--together", type=int, nargs="+", default=[1, 2], help="least layers per block; 1 is by layer")
    parser.add_argument("--iterations", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--examples", type=int, default=128, help="number of examples to learn on")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/rounding.json"))
    return parser.parse_args()


def roundings(graph: qf.TrainableGraphModule, sample: qf.Sample, options: argparse.Namespace) -> Iterator[tuple]:
    """The name of each rounding method, its graph, and its seconds of process time."""
    yield "nearest", graph, 0.0
    for together in options.together:
        start = time.process_time()
        rounded = adaround(graph, sample, together=together, iterations=options.iterations, progress=False)
        yield ("by layer" if together == 1 else f"by block ({together})"), rounded, time.process_time() - start


def main() -> None:
    options = parse_arguments()
    warnings.simplefilter("ignore", qf.QuantflowWarning)  # the last block is learned by layer
    rows: dict[str, list[dict[str, float]]] = {}
    for seed in tqdm(range(options.seeds), desc="seeds"):
        torch.manual_seed(seed)
        data = digits(8, seed)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        loader = DataLoader(data.train, 50, shuffle=True, generator=torch.Generator().manual_seed(seed))
        for _ in tqdm(range(options.epochs), desc="train", leave=False):
            for x, y in loader:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        images = torch.stack([x for x, _ in cast(Iterable, data.held_out)])
        with torch.no_grad():
            wanted = model.eval()(images)
        exported = qf.export(model, (images[:2],), dynamic_batch=True).module()
        for bits in options.bits:
            scheme = Scheme(weight=TensorScheme(bits=bits, symmetric=True, per_channel=True))
            sample = qf.Sample(options.examples)
            graph = qf.prepare(exported, XNNPACKQuantizer(scheme))
            qf.calibrate(graph, (x for x, _ in loader), sample=sample, progress=False)
            for name, rounded, seconds in roundings(graph, sample, options):
                found = outputs(rounded, [(images,)], integers=True)[0][0]
                agreement = (found.argmax(1) == wanted.argmax(1)).double().mean().item()
                row = {"sqnr": signal_to_noise(wanted, found), "agreement": agreement, "seconds": seconds}
                rows.setdefault(f"W{bits}A8 {name}", []).append(row)
    report(options, rows)


def report(options: argparse.Namespace, rows: dict[str, list[dict[str, float]]]) -> None:
    print(f"\n{'':<20}{'logit SQNR, dB: mean (each seed)':<46}{'agreement':>10}{'seconds':>9}")
    for name, seeds in rows.items():
        mean = {key: statistics.mean(s[key] for s in seeds) for key in seeds[0]}
        each = f"{mean['sqnr']:.1f} ({', '.join(format(s['sqnr'], '.1f') for s in seeds)})"
        print(f"{name:<20}{each:<46}{mean['agreement']:>10.4f}{mean['seconds']:>9.1f}")
    write_record(options.output, options, rows)


if __name__ == "__main__":
    main()
