"""Executorch's operator test suite for backends, run through quantflow: float, int8 with PTQ, dynamic int8.

    python benchmarks/executorch_suite.py --flows float int8 dynamic --jobs 2
    python benchmarks/executorch_suite.py --flows float --only conv3d "adaptive_maxpool"

The suite is part of executorch's wheel (``executorch/backends/test/suite/operators``). A case lowers one or more models and
runs each on its own inputs, in a separate process that may crash or hang. The outcome of a case is the worst of its models:

- ``skipped``: the suite skips it, or the model does not run in eager mode.
- ``right``: in float, outputs within rounding (60 dB) of eager, integers and booleans equal; in integers, outputs within
  35 dB of the converted graph's, and within 8-bit rounding of eager.
- ``wrong``: other outputs.
- ``nothing``: the quantizer reports that it has no rule for any operator of the model.
- ``error``: another ``QuantflowError``; its stage, reason and node are recorded.
- ``exception``, ``crash``, ``hang``: failures of quantflow.

Writes JSON and prints one table.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import pkgutil
import warnings
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import SkipTest

import executorch.kernels.quantized  # noqa: F401  loaded once, before processes fork
import torch
import torch.utils._pytree as pytree
from executorch.backends.test.suite import operators
from fuzzing.isolate import Ended, isolated
from fuzzing.warm_up import warm_up
from record import write_record
from torch import nn
from tqdm import tqdm

import quantflow as qf
from quantflow.metrics import signal_to_noise
from quantizers import DYNAMIC_INT8, INT8, XNNPACKQuantizer

SCHEMES = {"float": None, "int8": INT8, "dynamic": DYNAMIC_INT8}
ENDS = ("skipped", "right", "nothing", "error", "wrong", "exception", "crash", "hang")  # from best to worst
FLOAT_DB, GRAPH_DB, EAGER_DB = 60.0, 35.0, 15.0
CANCELLED = 1e-5  # outputs below this are cancellation: only rounding is left


@functools.cache
def cases() -> tuple[str, ...]:
    """The names of all cases, as ``conv2d.test_conv2d_basic``."""
    found = []
    for info in pkgutil.iter_modules(operators.__path__):
        module = importlib.import_module(f"{operators.__name__}.{info.name}")
        found += [f"{info.name.removeprefix('test_')}.{name}" for name in vars(module) if name.startswith("test_")]
    return tuple(found)


class Runner:
    """The replacement of the suite's test runner, called with each model of a case."""

    def __init__(self, flow: str) -> None:
        self.flow, self.ends = flow, list[dict[str, Any]]()
        self._flow = SimpleNamespace(quantize=SCHEMES[flow] is not None)  # LSTM cases read it

    def lower_and_run_model(self, model: nn.Module, inputs: tuple, **_: Any) -> None:
        """Record the outcome of ``model`` on ``inputs``."""
        self.ends.append(outcome(model.eval(), tuple(inputs), self.flow))


def outcome(model: nn.Module, inputs: tuple, flow: str) -> dict[str, Any]:
    """The outcome of ``model`` in ``flow``: ``ends`` is one of :data:`ENDS`, the other entries are the details."""
    try:
        with torch.no_grad():
            expected = model(*inputs)
    except Exception as error:
        return {"ends": "skipped", "reason": f"{type(error).__name__}: {error}"[:300]}
    try:
        with torch.no_grad():
            graph = model if SCHEMES[flow] is None else quantized(model, inputs, SCHEMES[flow])
            program = qf.export(graph, inputs).to_core_aten().to_edge("xnnpack").to_executorch()
            found, reference = program(*inputs), graph(*inputs)
            delegated = program.delegation.fraction if program.delegation is not None else 0.0
    except qf.QuantflowError as error:
        ends = "nothing" if "quantized nothing" in error.reason else "error"
        return {"ends": ends, "stage": error.stage, "node": error.node, "reason": error.reason[:300]}
    except Exception as error:
        return {"ends": "exception", "reason": f"{type(error).__name__}: {error}"[:300]}
    return {**compared(expected, reference, found, flow), "delegated": round(delegated, 3)}


def quantized(model: nn.Module, inputs: tuple, scheme: Any) -> nn.Module:
    """The converted graph of ``model``, calibrated on ``inputs``."""
    prepared = qf.prepare(qf.export(model, inputs).module(), XNNPACKQuantizer(scheme))
    return qf.convert(qf.calibrate(prepared, [inputs], inputs=lambda batch: batch, progress=False))


def compared(eager: Any, graph: Any, program: Any, flow: str) -> dict[str, Any]:
    """The comparison of the outputs of ``program`` with those of the lowered ``graph`` and of ``eager``."""
    least = {"db": FLOAT_DB if flow == "float" else GRAPH_DB, "eager_db": FLOAT_DB if flow == "float" else EAGER_DB}
    found = {}
    right = True
    for name, reference in (("db", graph), ("eager_db", eager)):
        pairs = list(zip(pytree.tree_leaves(reference), pytree.tree_leaves(program), strict=True))
        found[name] = min(decibels(ours, theirs) for theirs, ours in pairs)
        right = right and all(fits(ours, theirs, least[name]) for theirs, ours in pairs)
    told = {name: round(min(db, 999.0), 1) for name, db in found.items()}
    return {"ends": "right" if right else "wrong", **told}


def fits(ours: Any, theirs: Any, least: float) -> bool:
    """Whether ``ours`` equals ``theirs`` within the tolerance ``least``, dB."""
    if not isinstance(theirs, torch.Tensor) or not theirs.is_floating_point():
        return decibels(ours, theirs) == float("inf")
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    close = torch.allclose(ours, theirs, rtol=0.0, atol=CANCELLED, equal_nan=True)
    return close or decibels(ours, theirs) >= least


def decibels(ours: Any, theirs: Any) -> float:
    if not isinstance(theirs, torch.Tensor):
        return float("inf") if ours == theirs else float("-inf")
    if ours.shape != theirs.shape:
        return float("-inf")
    return signal_to_noise(theirs, ours)


def run_case(task: tuple[str, str]) -> list[dict[str, Any]]:
    """The outcomes of the models of one case, ``(flow, case)``."""
    warnings.simplefilter("ignore")
    flow, case = task
    torch.manual_seed(zlib.crc32(case.encode()))
    module, name = case.split(".")
    function = getattr(importlib.import_module(f"{operators.__name__}.test_{module}"), name)
    runner = Runner(flow)
    try:
        function(runner, dtype=torch.float32) if hasattr(function, "pytestmark") else function(runner)
    except SkipTest as skipped:
        return [{"ends": "skipped", "reason": str(skipped)}]
    return runner.ends


def row_of(end: Ended[tuple[str, str]]) -> dict[str, Any]:
    """The record of one case."""
    flow, case = end.task
    models = end.value
    if end.kind != "returned":
        reason = end.text[-300:] if end.kind == "raised" else end.text[:300]
        models = [{"ends": "exception" if end.kind == "raised" else end.kind, "reason": reason}]
    worst = max(models, key=lambda m: ENDS.index(m["ends"]))
    return {"flow": flow, "case": case, **worst, "models": [m["ends"] for m in models], "seconds": end.seconds}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"| flow | cases | {' | '.join(ENDS)} |", "|---" * (2 + len(ENDS)) + "|"]
    for flow in dict.fromkeys(row["flow"] for row in rows):
        counts = Counter(row["ends"] for row in rows if row["flow"] == flow)
        lines.append(f"| {flow} | {counts.total()} | {' | '.join(str(counts[end]) for end in ENDS)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flows", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    parser.add_argument("--only", nargs="+", default=[""], help="run only cases whose name contains one of these")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=300.0, help="time limit after which a case counts as hanging")
    parser.add_argument("--output", type=Path, default=Path("runs/executorch_suite.json"))
    options = parser.parse_args()
    chosen = [case for case in cases() if any(part in case for part in options.only)]
    tasks = [(flow, case) for flow in options.flows for case in chosen]
    warm_up()
    rows: list[dict[str, Any]] = []
    with tqdm(total=len(tasks), desc="cases") as bar:
        for end in isolated(run_case, tasks, jobs=options.jobs, seconds=options.seconds):
            rows.append(row_of(end))
            rows.sort(key=lambda row: tasks.index((row["flow"], row["case"])))
            write_record(options.output, options, rows)  # after each case, so that an interrupted run leaves a record
            bar.update()
    print(table(rows))
    for row in rows:
        if row["ends"] not in ("skipped", "right", "nothing"):
            print(row["flow"], row["case"], row["ends"], row.get("node") or "", row.get("reason", ""), sep="  ")


if __name__ == "__main__":
    main()
