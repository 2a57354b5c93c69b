"""The cost of each stage by the size of the graph: chains of layers, and a recurrent layer beside the same linear layers.

    python benchmarks/graph_size.py                          # up to 20,000 nodes
    python benchmarks/graph_size.py --layers 25 100 --steps 50

A chain has layers of ``relu(linear(x)) + 0.5 * x``, in int8. An LSTM is unrolled into its steps; beside it stands a network of
two linear layers a step with the same weights in each. Seconds of process time on one thread, without imports.
"""

from __future__ import annotations

import argparse
import itertools
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from record import write_record
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

STAGES = ("export", "plan", "prepare", "calibrate", "convert", "export again", "core ATen", "edge", "executorch")


class Chain(nn.Module):
    """A chain of linear layers with residual connections."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = F.relu(layer(x)) + 0.5 * x
        return x


class Recurrent(nn.Module):
    """An LSTM and a classifier of its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(32, 32, batch_first=True), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Products(nn.Module):
    """The linear layers of :class:`Recurrent`, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.hidden, self.head = nn.Linear(32, 128), nn.Linear(32, 128), nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x[:, 0]
        for step in range(x.shape[1]):
            h = F.relu(self.given(x[:, step]) + self.hidden(h))[:, :32]
        return self.head(h)


def measured(name: str, model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Seconds of each stage from ``model`` to its program in int8, and the number of nodes of the converted graph."""
    import quantflow as qf
    from quantizers import XNNPACKQuantizer

    times = [time.process_time()]

    def passed(made: Any) -> Any:
        times.append(time.process_time())
        return made

    quantizer = XNNPACKQuantizer()
    graph = passed(qf.export(model.eval(), (x,)).module().eval())
    plan = passed(quantizer.plan(graph))
    prepared = passed(qf.prepare(graph, quantizer))
    passed(qf.calibrate(prepared, [x, x], progress=False))
    converted = passed(qf.convert(prepared))
    exported = passed(qf.export(converted, (x,)))
    core = passed(exported.to_core_aten())
    edge = passed(core.to_edge("xnnpack"))
    program = passed(edge.to_executorch())
    seconds = [round(later - before, 2) for before, later in itertools.pairwise(times)]
    nodes = len(converted.graph.nodes)
    calls = {"calls": program.delegation.calls, "planned calls": plan.calls, "bytes": len(program.buffer)}
    by_stage = dict(zip(STAGES, seconds, strict=True))
    return {
        "network": name,
        "nodes": nodes,
        **calls,
        "seconds": by_stage,
        "ms_per_node": round(1e3 * sum(seconds) / nodes, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="*", default=[25, 100, 400, 1200], help="the lengths of the chains")
    parser.add_argument("--steps", type=int, nargs="*", default=[12, 50, 200], help="the steps of the recurrent layers")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/graph_size.json"))
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured("warm-up", Chain(1), torch.randn(1, 8))
    cases: list[tuple[str, nn.Module, torch.Tensor]] = [
        (f"chain of {n}", Chain(n), torch.randn(1, 8)) for n in options.layers
    ]
    for steps in options.steps:
        x = torch.randn(1, steps, 32)
        cases += [(f"LSTM, {steps} steps", Recurrent(), x), (f"linear layers, {steps} steps", Products(), x)]
    rows = []
    print("| network | nodes | calls | " + " | ".join(STAGES) + " | ms a node |")
    print("|" + "---|" * (len(STAGES) + 4))
    for case in tqdm(cases, desc="networks"):
        row = measured(*case)
        rows.append(row)
        print(
            "|",
            *(f"{cell} |" for cell in (row["network"], row["nodes"], row["calls"], *row["seconds"].values())),
            row["ms_per_node"],
            "|",
        )
        write_record(options.json, options, rows)


if __name__ == "__main__":
    main()
