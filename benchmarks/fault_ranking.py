"""The rank that ``qf.diagnose`` gives to a layer with an injected fault, a hundred times for each kind of fault.

    python benchmarks/fault_ranking.py

The faults are a wrong scale, a clipped range, a batch norm folded with another ``eps``, and a wrong zero point. Each seed gives
another network (weights, statistics, data) and draws the layer and the size of each fault.
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from record import write_record
from torch import nn
from torch.fx import GraphModule, Node
from tqdm import tqdm

import quantflow as qf
from quantflow.graph.aten import op, set_argument
from quantflow.graph.modes import BATCH_NORM
from quantflow.graph.parameters import is_constant, tensor_of
from quantflow.observers import FixedQParamsObserver
from quantflow.observers.observation import observer_of
from quantflow.qparams.qparams import choose_qparams
from quantizers import XNNPACKQuantizer

EPS, LOST_EPS = 1e-3, 1e-5


class Network(nn.Module):
    """Convolutions with batch norm, a depthwise one, a residual, a squeeze-and-excite block, three kinds of activation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _normed(3, 16, nn.ReLU6(), stride=2)
        self.expand = _normed(16, 24, nn.Hardswish(), kernel=1)
        self.depthwise = _normed(24, 24, nn.ReLU(), groups=24)
        self.project = _normed(24, 16, nn.Identity(), kernel=1)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 1), nn.Sigmoid()
        )
        self.last = _normed(16, 32, nn.SiLU())
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.project(self.depthwise(self.expand(x)))
        x = x + y * self.gate(y)
        return self.head(self.last(x).mean((2, 3)))


def _normed(inputs: int, outputs: int, activation: nn.Module, kernel: int = 3, **spec: Any) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **spec)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs, eps=EPS), activation)


@dataclass(frozen=True)
class Subject:
    """A float graph, its calibrated graph, its converted graph, and the data."""

    graph: GraphModule
    prepared: GraphModule
    converted: GraphModule
    data: list[torch.Tensor]


def subject(seed: int) -> Subject:
    """The network, statistics and data of ``seed``.

    The batches are small enough for observers to keep all values, so that no range is wrong by chance.
    """
    torch.manual_seed(seed)
    model = Network()
    data = [torch.randn(2, 3, 1, 1) + torch.randn(2, 3, 12, 12) for _ in range(12)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
            if isinstance(module, nn.Conv2d) and module.bias is None:
                module.weight *= 0.1 * torch.rand(len(module.weight), 1, 1, 1)  # makes some variances as small as eps
        model(torch.cat(data))
    graph = copy.deepcopy(_captured())
    graph.load_state_dict(model.state_dict())
    prepared = _calibrated(graph, data)
    return Subject(graph, prepared, qf.convert(prepared), data)


# Returns a quantized graph with a fault, and the names of the faulty nodes.
Fault = Callable[[Subject, random.Random], tuple[GraphModule, set[str]]]


def bad_scale(subject: Subject, draw: random.Random) -> tuple[GraphModule, set[str]]:
    """A scale of an activation or weight that is too large or too small by a factor of two to eight."""
    converted = copy.deepcopy(subject.converted)
    factor = draw.uniform(2, 8) ** draw.choice((-1, 1))
    if draw.random() < 0.5:
        node = draw.choice([n for n in converted.graph.nodes if "dequantize_per_channel" in str(n.target)])
        tensor_of(converted, node.args[1]).mul_(factor)
        return converted, {user.name for user in node.users}
    node = draw.choice(_own_grids(converted))
    scale, zero_point = cast(tuple[float, int], node.args[1:3])
    return converted, _rewrite(converted, node, scale * factor, zero_point)


def clipped_range(subject: Subject, draw: random.Random) -> tuple[GraphModule, set[str]]:
    """An observed range of a prepared graph, reduced to a fifth to a half."""
    prepared = copy.deepcopy(subject.prepared)
    calls = [n for n in prepared.graph.nodes if observer_of(n, prepared) is not None and not is_constant(n.args[0])]
    shared = [n.target for n in calls]
    node = draw.choice([n for n in calls if shared.count(n.target) == 1])
    observer: Any = observer_of(node, prepared)
    scale, zero_point = observer.calculate_qparams()
    low, high = ((q - zero_point) * scale for q in (observer.quant_min, observer.quant_max))
    kept = draw.uniform(0.2, 0.5)
    limits = {"quant_min": observer.quant_min, "quant_max": observer.quant_max}
    grid = choose_qparams(low * kept, high * kept, symmetric=False, **limits)
    prepared.set_submodule(str(node.target), FixedQParamsObserver.like(observer, *grid))
    return prepared, _chain(node.args[0])


def lost_eps(subject: Subject, draw: random.Random) -> tuple[GraphModule, set[str]]:
    """A batch norm folded with a wrong eps."""
    broken = copy.deepcopy(subject.graph)
    norm = draw.choice([n for n in broken.graph.nodes if op(n) is BATCH_NORM])
    set_argument(norm, "eps", LOST_EPS)
    broken.recompile()
    return qf.convert(_calibrated(broken, subject.data)), {norm.args[0].name}


def wrong_zero_point(subject: Subject, draw: random.Random) -> tuple[GraphModule, set[str]]:
    """A zero point with an error of 16 to 64 in dequantize only, or of 48 to 96 in quantize as well.

    The latter shifts the range. A smaller shift costs no more than deliberate clipping of outliers does.
    """
    converted = copy.deepcopy(subject.converted)
    node = draw.choice(_own_grids(converted))
    both = draw.random() < 0.5
    off = draw.randint(48, 96) if both else draw.randint(16, 64)
    scale, zero_point = cast(tuple[float, int], node.args[1:3])
    zero_point += off if zero_point + off <= 127 else -off
    return converted, _rewrite(converted, node, scale, zero_point, both=both)


FAULTS: dict[str, Fault] = {
    "bad scale": bad_scale,
    "clipped range": clipped_range,
    "lost eps": lost_eps,
    "wrong zero point": wrong_zero_point,
}


@functools.cache
def _captured() -> GraphModule:
    return qf.export(Network().eval(), (torch.zeros(1, 3, 12, 12),), dynamic_batch=True).module()


def _calibrated(graph: GraphModule, data: list[torch.Tensor]) -> GraphModule:
    return qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), data, progress=False)


def _own_grids(converted: GraphModule) -> list[Node]:
    """The quantize nodes whose quantization parameters no other tensor shares."""
    nodes = [n for n in converted.graph.nodes if "quantize_per_tensor" in n.name and "dequantize" not in n.name]
    grids = [n.args[1:3] for n in nodes]
    return [n for n in nodes if grids.count(n.args[1:3]) == 1]


def _rewrite(converted: GraphModule, node: Node, scale: float, zero_point: int, both: bool = True) -> set[str]:
    """Change scale and zero point of a quantize node and of its dequantize nodes; returns the names of the faulty nodes."""
    for changed in (*([node] if both else []), *node.users):
        changed.args = (changed.args[0], scale, zero_point, *changed.args[3:])
    converted.recompile()
    return _chain(node.args[0])


def _chain(node: Any) -> set[str]:
    """The names of ``node`` and, if it is a clamp, of its input."""
    return {node.name} | (_chain(node.args[0]) if op(node) in _CLAMPS else set())


_CLAMPS = {torch.ops.aten.relu.default, torch.ops.aten.hardtanh.default, torch.ops.aten.relu6.default}


def rank(seed: int, fault: str, subject: Subject) -> dict[str, Any]:
    """The rank of the faulty layer in the diagnosis, by both rankings; 1 is first."""
    broken, culprits = FAULTS[fault](subject, random.Random(f"{seed} {fault}"))
    diagnosis = qf.diagnose(subject.graph, broken, [torch.cat(subject.data)], progress=False)
    places = [
        next((i for i, found in enumerate(order, 1) if found.node in culprits), len(order) + 1)
        for order in (diagnosis.layers, diagnosis.by_effect())
    ]
    first = diagnosis.layers[0]
    return {
        "seed": seed,
        "fault": fault,
        "rank": places[0],
        "rank_by_effect": places[1],
        "layers": len(diagnosis.layers),
        "culprit": sorted(culprits)[0],
        "first": first.node,
        "first_excess_db": round(first.excess, 2),
    }


def measure(seeds: int, *, progress: bool = True) -> list[dict[str, Any]]:
    """One row per seed and fault."""
    rows = []
    for seed in tqdm(range(seeds), unit="seed", disable=not progress):
        planted = subject(seed)
        rows += [rank(seed, fault, planted) for fault in FAULTS]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/fault_ranking.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(options.seeds)
    print(f"{'fault':<18}{'seeds':>6}{'first':>7}{'in three':>10}{'first by effect':>17}")
    summary = []
    for fault in FAULTS:
        found = [row for row in rows if row["fault"] == fault]
        counts = {
            "first": sum(row["rank"] == 1 for row in found),
            "in_three": sum(row["rank"] <= 3 for row in found),
            "first_by_effect": sum(row["rank_by_effect"] == 1 for row in found),
        }
        print(f"{fault:<18}{len(found):>6}{counts['first']:>7}{counts['in_three']:>10}{counts['first_by_effect']:>17}")
        missed = [row for row in found if row["rank"] > 1]
        summary.append({"fault": fault, "seeds": len(found), **counts, "not_first": missed})
    write_record(options.output, options, summary)


if __name__ == "__main__":
    main()
