"""Cases in which the stock flow gives a wrong or unloadable program, compared with quantflow.

    python benchmarks/stock_path.py                      # all of hazards.py and graph_hazards.py in tests/support/
    python benchmarks/stock_path.py --only "mish" "QAT"  # cases whose name contains one of these

The stock flow is torchao's prepare_pt2e or prepare_qat_pt2e and convert_pt2e with executorch's XNNPACKQuantizer (per-channel
weights) and XnnpackPartitioner, then the runtime. Each case runs in a separate process, about 10 s. The checks and the dB that
each requires are in tests/support/hazards.py; ``make test`` runs them for quantflow. Prints the table of
docs/benchmarks/hazards.md, writes JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import executorch.kernels.quantized  # noqa: F401  loaded once, before processes fork
import torch
import torchao.quantization.pt2e as pt2e
from executorch import exir
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.runtime import Runtime
from peers import stock_quantizer
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e, prepare_qat_pt2e
from tqdm import tqdm

import quantflow as qf
from quantflow.metrics import signal_to_noise

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from graph_hazards import HAZARDS as GRAPHS
from graph_hazards import Function
from hazards import HAZARDS, Hazard, Quantflow

EXACT = 999.0  # dB, for equal outputs


class Stock:
    """The stock flow of torchao and executorch, as in their documentation."""

    def prepare(self, model: Any, args: tuple, *, qat: bool = False, bits: int = 8) -> Any:
        quantizer = stock_quantizer(qat=qat, bits=bits)
        graph: Any = torch.export.export(model.train(qat), args).module()
        if not qat:
            return prepare_pt2e(graph, quantizer)
        return pt2e.allow_exported_model_train_eval(prepare_qat_pt2e(graph, quantizer))

    def calibrate(self, graph: Any, args: tuple) -> None:
        graph(*args)

    def train(self, graph: Any, mode: bool) -> None:
        graph.train(mode)

    def convert(self, graph: Any) -> Any:
        return convert_pt2e(graph)

    def lower(self, graph: Any, args: tuple) -> Callable[..., Any]:
        program = Runtime.get().load_program(self.serialise(graph, args))
        method = program.load_method("forward")

        def run(*inputs: torch.Tensor) -> torch.Tensor:
            assert program is not None  # the closure keeps the program alive, which owns the method's memory
            return method.execute([x.contiguous() for x in inputs])[0].clone()

        return run

    def serialise(self, graph: Any, args: tuple) -> bytes:
        exported = torch.export.export(graph, args)
        return exir.to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch().buffer


def warm_up() -> None:
    """Initialize executorch once, before processes fork. The runtime is not used: its threads do not survive a fork."""
    for tools in (Stock(), Quantflow()):
        for qat in (False, True):
            model, args = (
                torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)),
                (torch.randn(2, 3, 8, 8),),
            )
            prepared = tools.prepare(model.eval(), args, qat=qat)
            tools.calibrate(prepared, args)
            tools.train(prepared, False) if qat else None
            converted = tools.convert(prepared)
            if isinstance(tools, Stock):
                tools.serialise(converted, args)
            else:
                qf.export(converted, args).to_core_aten().to_edge("xnnpack")


def graph_hazard(function: Any) -> Hazard:
    """A hand-written quantized graph, as another tool would produce it, and its lowering."""

    def law(tools: Any) -> float:
        model, x = Function(function), torch.randn(2, 4, 4, 4)
        return signal_to_noise(model(x), tools.lower(model, (x,))(x))

    return Hazard("the partitioner takes what the delegate does not", law, least=25)


def outcome(hazard: Hazard, tools: Any, result: Any) -> None:
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    try:
        found = hazard.law(tools)
    except qf.QuantflowError as error:
        result.send({"ends": "error", "says": f"[{error.stage}] {error.reason}"})
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        kind = "does not load" if "load method" in text else "does not run" if "execute()" in text else "raises"
        result.send({"ends": kind, "says": f"{type(error).__name__}: {text[:100]}"})
    else:
        result.send({"ends": "right" if found >= hazard.least else "wrong", "db": round(min(found, EXACT), 1)})


def measured(hazard: Hazard, tools: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=outcome, args=(hazard, tools, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return {"ends": "crashes", "says": f"signal {-(process.exitcode or 0)}"}
    finally:
        process.join()


def told(found: dict[str, Any]) -> str:
    if "db" in found:
        return f"{found['ends']}, {found['db']} dB" if found["db"] < EXACT else f"{found['ends']}, exact"
    return f"{found['ends']}: {found['says']}" if found["ends"] in ("error", "raises", "crashes") else found["ends"]


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| hazard | stock | quantflow | cause | source |", "|---|---|---|---|---|"]
    for row in rows:
        cells = (row["hazard"], told(row["stock"]), told(row["quantflow"]), row["cause"], row["source"])
        lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    for part, kind in (("models", False), ("graphs", True)):
        of = [row for row in rows if row["hazard"].startswith("graph: ") is kind]
        failed = sum(row["stock"]["ends"] != "right" for row in of)
        ours = sum(row["quantflow"]["ends"] not in ("right", "error") for row in of)
        lines.append(f"\n{part}: stock fails {failed} of {len(of)}, quantflow {ours}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="only hazards whose name contains one of these")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/hazards.json"))
    options = parser.parse_args()
    hazards = {**HAZARDS, **{f"graph: {name}": graph_hazard(function) for name, function in GRAPHS.items()}}
    chosen = {name: hazard for name, hazard in hazards.items() if any(part in name for part in options.only)}
    rows: list[dict[str, Any]] = []
    options.output.parent.mkdir(parents=True, exist_ok=True)
    warm_up()
    for name, hazard in tqdm(chosen.items(), desc="hazards"):
        row = {"hazard": name, "cause": hazard.cause, "source": hazard.source, "least_db": hazard.least}
        rows.append({**row, "stock": measured(hazard, Stock()), "quantflow": measured(hazard, Quantflow())})
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
