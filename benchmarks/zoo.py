"""Torchvision's models through float export, PTQ and QAT to a ``.pte`` that runs: one per family, or all.

    python benchmarks/zoo.py                            # one model per family
    python benchmarks/zoo.py --all --jobs 2             # every classification, segmentation and video model
    python benchmarks/zoo.py --models mobilenet_v3_small efficientnet_b0 --stock --recover

Weights are random, also those of a head that torchvision initializes to zero; batch norm statistics come from data (crops of
scikit-learn's two photographs). PTQ is calibrated on 32 images, with ``--recover`` also recovered, and compared with float on
eight others. Each model runs in a separate process and writes its result immediately; existing results are not computed again
(``--fresh`` does). Figures named ``.pte`` ran on the ExecuTorch runtime. Prints a table and writes JSON and markdown.

``planned calls`` is the plan's forecast of delegate calls, ``calls`` their number in the lowered program. ``int8`` is the share
of multiply-accumulates of convolutions and linear layers with quantized inputs and weights.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

FAMILIES = (
    *("alexnet", "vgg11_bn", "resnet18", "squeezenet1_1", "densenet121", "inception_v3", "googlenet"),
    *("shufflenet_v2_x0_5", "mobilenet_v2", "mobilenet_v3_small", "mnasnet0_5", "regnet_y_400mf", "efficientnet_b0"),
    *("convnext_tiny", "vit_b_16", "swin_t", "maxvit_t"),
    *("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large", "r3d_18"),
)
COLUMNS = (
    "model",
    "stage",
    "int8",
    "planned calls",
    "calls",
    "to_q_db",
    "to_pte_db",
    "stock_db",
    "pte/float",
    "ms",
    "float_ms",
    "outside",
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help="only these models")
    parser.add_argument("--all", action="store_true", help="every classification, segmentation and video model")
    parser.add_argument("--modes", nargs="+", default=["float", "ptq", "qat"], choices=["float", "ptq", "qat"])
    parser.add_argument("--stock", action="store_true", help="also the stock quantizer and observers, simulated")
    parser.add_argument(
        "--recover", action="store_true", help="recover accuracy after calibration, as qf.quantize does"
    )
    parser.add_argument("--jobs", type=int, default=1, help="number of models at a time")
    parser.add_argument("--fresh", action="store_true", help="ignore existing results")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/zoo"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def model_and_data(name: str) -> tuple[Any, Callable[[int], Any]]:
    """The model ``name`` with statistics from data, and a function that makes a batch for it."""
    import torch
    from sklearn.datasets import load_sample_images
    from torch import nn
    from torchvision import models

    options: dict[str, Any] = {"weights_backbone": None} if name.startswith(("deeplab", "fcn", "lraspp")) else {}
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": True}
    model = models.get_model(name, weights=None, **options)
    video = name in models.list_models(models.video)
    shape = (3, 8, 64, 64) if video else (3, 299, 299) if name == "inception_v3" else (3, 224, 224)

    photographs = [torch.from_numpy(image.copy()).permute(2, 0, 1) / 255 for image in load_sample_images().images]

    def crop() -> torch.Tensor:
        photograph = photographs[int(torch.randint(len(photographs), ()))]
        height, width = photograph.shape[1:]
        side = int(torch.randint(48, height, ()))
        top, left = (int(torch.randint(size - side + 1, ())) for size in (height, width))
        piece = photograph[:, top : top + side, left : left + side]
        return nn.functional.interpolate(piece[None], shape[-2:], mode="bilinear", antialias=True)[0]

    def batch(count: int) -> torch.Tensor:
        images = torch.stack([crop() for _ in range(count)]) * 4 - 2
        return images if not video else torch.stack([images.roll(t, -1) for t in range(shape[1])], 2)  # shifted frames

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [m.momentum for m in norms]
    model.eval()
    for norm in norms:
        norm.momentum = None
        norm.reset_running_stats()
        norm.train()
    with torch.no_grad():
        for _ in range(4):
            model(batch(8))
        for module in model.modules():
            if isinstance(module, nn.Linear) and not module.weight.any():
                nn.init.normal_(module.weight, std=0.02)  # ViT's head
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval(), batch


def run(name: str, modes: list[str], stock: bool, recover: bool) -> dict[str, Any]:
    """All measurements of one model."""
    import torch
    from torch import nn

    import quantflow as qf
    from quantizers import XNNPACKQuantizer

    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model, batch = model_and_data(name)
    result: dict[str, Any] = {"model": name, "modes": {}}
    dynamic = not name.startswith("swin")  # Swin's graph is specialized to the batch size of the capture
    test, calibration = batch(8), [batch(8) for _ in range(4)]
    x, calibration = test[:1], calibration if dynamic else [x for several in calibration for x in several.split(1)]
    reference = one_by_one(model, test)
    if "qat" in modes and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        modes = [m for m in modes if m != "qat"]
    captured = qf.export(model, (x,), dynamic_batch=dynamic).module()
    for mode in modes:
        row: dict[str, Any] = {"stage": "export", "seconds": {}}
        result["modes"][mode] = row
        clock = Clock(row)
        try:
            graph = captured
            if mode != "float":
                row["planned calls"] = XNNPACKQuantizer().plan(graph, qat=mode == "qat").calls
                clock("plan")
                graph = qf.prepare(graph, XNNPACKQuantizer(), qat=mode == "qat")
                clock("prepare")
                sample = qf.Sample()
                qf.calibrate(graph, calibration, progress=False, sample=sample)
                clock("calibrate")
            if mode == "ptq" and recover:
                graph = qf.recover(graph, sample, progress=False).graph
                clock("recover")
            if mode == "qat":
                step(graph, calibration[0])
                clock("train")
                reference_of_mode = one_by_one(graph.eval(), test)
            if mode != "float":
                graph = qf.convert(graph)
                clock("convert")
                row["int8"] = integer_share(graph)
            output = one_by_one(graph, test)
            row["to_q_db"] = sqnr(reference_of_mode if mode == "qat" else reference, output)
            row["nodes"] = sum(n.op == "call_function" for n in graph.graph.nodes)
            edge = qf.export(graph, (x,)).to_core_aten().to_edge("xnnpack")
            clock("edge")
            program = edge.to_executorch()
            clock("executorch")
            delegation = program.delegation
            assert delegation is not None
            row.update(
                calls=delegation.calls,
                outside=dict(delegation.portable),
                floating=dict(delegation.floating),
                bytes=len(program.buffer),
                to_pte_db=sqnr(output[:1], first(program(x))),
                ms=latency(program, x),
            )
            clock("run")
            row["stage"] = "runs"
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {error}"[:500]
    if stock:
        result["stock_db"] = stock_sqnr(captured, calibration, test, reference)
    return result


class Clock:
    """Records the seconds since its last call under the name of a stage."""

    def __init__(self, row: dict[str, Any]) -> None:
        self.row, self.start = row, time.perf_counter()

    def __call__(self, stage: str) -> None:
        self.row["stage"] = stage
        self.row["seconds"][stage] = round(time.perf_counter() - self.start, 2)
        self.start = time.perf_counter()


def step(graph: Any, x: Any) -> None:
    import torch

    optimizer = torch.optim.SGD(graph.train().parameters(), 1e-4)
    first(graph(x)).square().mean().backward()
    optimizer.step()


def first(output: Any) -> Any:
    """The main output, the only one that is compared."""
    return next(iter(output.values())) if isinstance(output, dict) else output


def one_by_one(graph: Any, images: Any) -> Any:
    import torch

    with torch.no_grad():
        return torch.cat([first(graph(image)) for image in images.split(1)])


def integer_share(graph: Any) -> float:
    from quantflow.graph.aten import CONVOLUTIONS, LINEARS, TRANSPOSED_CONVOLUTIONS, argument, op, value

    total = integers = 0
    for node in graph.graph.nodes:
        if op(node) not in CONVOLUTIONS | LINEARS | TRANSPOSED_CONVOLUTIONS:
            continue
        weight, val = argument(node, "weight"), value(node)
        size = value(weight)
        if val is None or size is None:
            continue
        shape = [s if isinstance(s, int) else s.node.hint for s in val.shape]
        macs = size.numel() * math.prod(shape) // shape[-1 if op(node) in LINEARS else 1]
        total += macs
        quantized = all("dequantize" in str(n.target) for n in (node.args[0], weight))
        integers += macs * (
            quantized
            and all(
                "quantize" in str(u.target) or "relu" in str(u.target) or "hardtanh" in str(u.target)
                for u in node.users
            )
        )
    return round(integers / total, 4) if total else 1.0


def sqnr(reference: Any, approximation: Any) -> float:
    from quantflow.metrics import signal_to_noise

    return round(min(signal_to_noise(reference, approximation), 999.0), 1)


def latency(program: Any, x: Any) -> float:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        program(x)
        times.append(time.perf_counter() - start)
    return round(sorted(times)[3] * 1e3, 2)


def stock_sqnr(captured: Any, calibration: list, test: Any, reference: Any) -> float:
    """The SQNR of the stock XNNPACK quantizer with its observers, stock prepare and stock convert."""
    import torch
    from peers import stock_calibrate, stock_prepared
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    prepared = stock_prepared(captured.eval(), calibration[:1])
    stock_calibrate(prepared, calibration)
    with torch.no_grad():
        return sqnr(reference, first(convert_pt2e(prepared)(test)))


def report(results: list[dict[str, Any]], output: Path) -> None:
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
    ]
    for result in results:
        modes = result.get("modes", {})
        base = modes.get("float", {})
        for mode, row in modes.items():
            if mode == "float" and "error" not in row:
                continue
            outside = {**row.get("outside", {}), **{f"{k} (float)": v for k, v in row.get("floating", {}).items()}}
            worst = sorted(outside, key=outside.__getitem__, reverse=True)[:4]
            cells = {
                "model": f"{result['model']} {mode}",
                "stage": row["stage"] if "error" not in row else f"{row['stage']}: {row['error'][:80]}",
                "stock_db": result.get("stock_db") if mode == "ptq" else None,
                "pte/float": round(row["bytes"] / base["bytes"], 3) if "bytes" in row and "bytes" in base else None,
                "float_ms": base.get("ms"),
                "outside": ", ".join(f"{outside[w]} {w.removeprefix('aten::')}" for w in worst),
            }
            values = {**{c: row.get(c) for c in COLUMNS}, **cells}
            lines.append("| " + " | ".join("" if values[c] is None else str(values[c]) for c in COLUMNS) + " |")
        if "error" in result:
            lines.append(f"| {result['model']} | {result['error']} |" + " |" * (len(COLUMNS) - 2))
    text = "\n".join(lines) + "\n"
    print(text)
    output.with_suffix(".md").write_text(text)
    output.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    options = parse_arguments()
    if options.one:
        result = run(options.one, options.modes, options.stock, options.recover)
        (options.output / f"{options.one}.json").write_text(json.dumps(result))
        return
    from tqdm import tqdm

    names = options.models or list(FAMILIES)
    if options.all:
        from torchvision import models

        rooms = (models, models.segmentation, models.video)
        names = [n for room in rooms for n in models.list_models(room) if "quantized" not in n]
    options.output.mkdir(parents=True, exist_ok=True)
    switches = [f"--{name}" for name in ("stock", "recover") if getattr(options, name)]
    flags = ["--modes", *options.modes, "--output", str(options.output), *switches]

    def one(name: str) -> None:
        path = options.output / f"{name}.json"
        if path.exists() and not options.fresh:
            return
        command = [sys.executable, __file__, "--one", name, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            error = (done.stderr.strip().splitlines() or ["?"])[-1]
            path.write_text(json.dumps({"model": name, "modes": {}, "error": f"exit {done.returncode}: {error[:200]}"}))

    with ThreadPoolExecutor(options.jobs) as pool:
        for _ in tqdm(as_completed([pool.submit(one, name) for name in names]), total=len(names), desc="models"):
            pass
    report([json.loads((options.output / f"{name}.json").read_text()) for name in names], options.output)


if __name__ == "__main__":
    main()
