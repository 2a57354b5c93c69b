"""Dynamic int8 quantization of a small transformer that classifies text by language.

    python recipes/ptq_text.py                                 # source code of installed packages, one or two minutes
    python recipes/ptq_text.py --data texts/ --length 240      # your data: one folder of text files per class

The recipe trains in float, quantizes the linear layers (int8 weights per channel; input ranges computed at run time, because
activations differ from token to token), lowers to XNNPACK, and measures the float graph, the converted graph and the ``.pte``
on snippets from held-out files.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sized
from pathlib import Path
from typing import cast

import torch
from results import output_folder, write_result
from text_data import text_data
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

import quantflow as qf
from quantflow.malloc import keep_freed_memory
from quantizers import DYNAMIC_INT8, XNNPACKQuantizer

BYTES_A_TOKEN = 6


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", default="languages", help="languages, or a folder with one folder of text files per class"
    )
    parser.add_argument("--length", type=int, default=96, help=f"bytes per snippet, a multiple of {BYTES_A_TOKEN}")
    parser.add_argument("--train-snippets", type=int, default=1500, help="of each class")
    parser.add_argument("--held-out-snippets", type=int, default=250, help="of each class")
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--calibration-snippets", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/ptq_text"))
    return parser.parse_args()


class Block(nn.Module):
    """Pre-norm self-attention and a two-layer perceptron, on [batch, tokens, width]."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.perceptron_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            part.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for part in self.query_key_value(self.attention_norm(x)).chunk(3, dim=2)
        )
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.project(attended)
        return x + self.narrow(F.gelu(self.widen(self.perceptron_norm(x))))


class TextClassifier(nn.Module):
    """A classifier of bytes, int64 [batch, length], with logits [batch, classes]; a token is a few adjacent bytes."""

    def __init__(self, length: int, classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width // BYTES_A_TOKEN)
        self.position = nn.Parameter(0.02 * torch.randn(length // BYTES_A_TOKEN, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        tokens = self.embedding(text).unflatten(1, (-1, BYTES_A_TOKEN)).flatten(2)
        return self.head(self.norm(self.blocks(tokens + self.position)).mean(1))


def main() -> None:
    options = parse_arguments()
    start = time.perf_counter()
    if options.length < BYTES_A_TOKEN or options.length % BYTES_A_TOKEN:
        remedy = f"a multiple of {BYTES_A_TOKEN}"
        raise qf.QuantflowError("recipe", "no whole number of tokens", node=f"--length {options.length}", remedy=remedy)
    keep_freed_memory()
    folder = output_folder(options.output)
    torch.manual_seed(options.seed)
    data = text_data(options.data, options.length, options.train_snippets, options.held_out_snippets, options.seed)
    loader = DataLoader(data.train, options.batch_size, shuffle=True, drop_last=True, generator=torch.Generator())
    model = TextClassifier(options.length, len(data.classes), options.width, options.depth)
    example = (torch.zeros(1, options.length, dtype=torch.long),)

    # Float: the captured graph trains like the model itself.
    graph = qf.export(model, example, dynamic_batch=True).module()
    optimizer = torch.optim.AdamW(graph.parameters(), options.lr, weight_decay=0.01)
    steps = options.epochs * len(loader)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)
    print(f"training on {', '.join(data.classes)}: {options.epochs} epochs of {len(loader)} steps")
    qf.train(graph, loader, epochs=options.epochs, optimizer=optimizer, scheduler=scheduler, seed=options.seed)
    graph.eval()

    # Dynamic int8: weights are quantized now, inputs at run time.
    count = len(cast(Sized, data.train))
    spread = range(0, count, max(count // options.calibration_snippets, 1))  # indices spread over all classes
    calibration = Subset(data.train, spread)
    quantizer = XNNPACKQuantizer(DYNAMIC_INT8)
    result = qf.quantize(graph, example, DataLoader(calibration, options.batch_size), quantizer=quantizer)
    print(result.report)
    result.program.save(folder / "model.pte")
    float_program = qf.export(graph, example).to_core_aten().to_edge("xnnpack").to_executorch()

    # All stages are measured on the same held-out snippets; the .pte stages run on the ExecuTorch runtime.
    stages = {"float": graph, "converted": result.graph, "pte": result.program, "float_pte": float_program}
    found = qf.verify(stages, DataLoader(data.held_out, options.batch_size))
    print(f"\n{found}")
    pte, float_pte = found["pte"], found["float_pte"]
    assert pte.latency is not None  # both ran
    assert float_pte.latency is not None
    write_result(
        folder,
        {
            "held_out_snippets": found.examples,
            **{f"{stage.name}_accuracy": stage.output.top1 for stage in found.stages},
            "drop_points": pte.output.drop,
            "drop_interval_95": pte.output.drop_interval,
            "agreement_with_float": pte.output.agreement,
            "logit_sqnr_db": pte.output.sqnr_db,
            "float_bytes": float_pte.bytes,
            "pte_bytes": pte.bytes,
            "float_latency_ms": float_pte.latency.median_ms,
            "pte_latency_ms": pte.latency.median_ms,
            "delegated_fraction": result.report.delegated_fraction,
            "seconds": round(time.perf_counter() - start, 1),
        },
    )


if __name__ == "__main__":
    try:
        main()
    except qf.QuantflowError as error:
        sys.exit(f"error: {error}")
