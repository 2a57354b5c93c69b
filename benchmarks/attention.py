"""Accuracy and latency of one attention block on the runtime, with its matrix products in float and in int8.

    python benchmarks/attention.py                      # 197 tokens, 12 heads of 64: ViT-B
    python benchmarks/attention.py --tokens 1024 --heads 2 --repeats 30

``gain`` scales the weights of queries and keys, so that attention is spread out (1.7) or concentrated on few tokens (8). SQNR
in dB compares the program with the float module, on another input than that of calibration. Milliseconds are the median process
time of a call, summed over threads; the variants alternate. Writes JSON and prints one table.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from pathlib import Path

import torch
from record import write_record
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

import quantflow as qf
from quantizers import INT8, Scheme, TensorScheme, XNNPACKQuantizer

VARIANTS = {
    "float products": {},
    "int8 products": {"attention": INT8},
    "int8 products, min-max": {"attention": Scheme(activation=TensorScheme(observer="min_max"))},
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=197)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--head-size", type=int, default=64)
    parser.add_argument("--gains", type=float, nargs="+", default=[1.7, 4.0, 8.0])
    parser.add_argument("--repeats", type=int, default=60, help="counted calls of each variant")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/attention.json"))
    return parser.parse_args()


class Attention(nn.Module):
    """Multi-head attention, from and to float32 [batch, tokens, heads · size]."""

    def __init__(self, heads: int, size: int, gain: float) -> None:
        super().__init__()
        self.heads, width = heads, heads * size
        self.project, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        with torch.no_grad():
            self.project.weight[: 2 * width] *= gain

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


def lowered(model: nn.Module, x: Tensor, overrides: dict) -> qf.Program:
    graph = qf.prepare(qf.export(model, (x,)).module(), XNNPACKQuantizer(overrides=overrides))
    converted = qf.convert(qf.calibrate(graph, [x], progress=False))
    return qf.export(converted, (x,)).to_core_aten().to_edge("xnnpack").to_executorch()


def sqnr(expected: Tensor, given: Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - given).square().sum()))


@torch.no_grad()
def measure(options: argparse.Namespace) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for gain in tqdm(options.gains, desc="gains"):
        torch.manual_seed(0)
        # Overrides select a layer by name, so the layer needs one.
        attention = Attention(options.heads, options.head_size, gain)
        model = nn.Sequential()
        model.add_module("attention", attention)
        calibration, x = (torch.randn(1, options.tokens, options.heads * options.head_size) for _ in range(2))
        programs = {name: lowered(model.eval(), calibration, given) for name, given in VARIANTS.items()}
        taken: dict[str, list[float]] = {name: [] for name in programs}
        for _ in range(options.repeats):
            for name, program in programs.items():
                start = time.process_time()
                program(x)
                taken[name].append(time.process_time() - start)
        for name, program in programs.items():
            median = statistics.median(taken[name]) * 1e3
            rows.append({"gain": gain, "products": name, "sqnr_db": sqnr(model(x), program(x)), "ms": median})
    return rows


def main() -> None:
    warnings.simplefilter("ignore")
    options = parse_arguments()
    torch.set_num_threads(1)
    rows = measure(options)
    write_record(options.json, options, rows)
    print("| gain | variant | SQNR, dB | ms |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['gain']} | {row['products']} | {row['sqnr_db']:.1f} | {row['ms']:.2f} |")


if __name__ == "__main__":
    main()
