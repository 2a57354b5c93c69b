"""The measurements of one model of a zoo: float export, PTQ and QAT to a ``.pte`` that runs."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# A function that makes a batch of so many examples.
Batches = Callable[[int], torch.Tensor]


def crops(shape: tuple[int, ...]) -> Batches:
    """Crops of scikit-learn's two photographs in ``shape``: [3, height, width], or [3, frames, height, width], shifted."""
    from sklearn.datasets import load_sample_images

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
        return images if len(shape) == 3 else torch.stack([images.roll(t, -1) for t in range(shape[1])], 2)

    return batch


def with_statistics(model: nn.Module, batch: Batches) -> nn.Module:
    """``model`` in inference mode, with batch norm statistics from data and random numbers in layers that are all zero."""
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
                nn.init.normal_(module.weight, std=0.02)  # a classifier of zeros
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def measured(
    name: str, model: nn.Module, batch: Batches, modes: list[str], stock: bool, recover: bool
) -> dict[str, Any]:
    """All measurements of one model."""
    import quantflow as qf
    from quantizers import XNNPACKQuantizer

    warnings.simplefilter("ignore")
    result: dict[str, Any] = {"model": name, "modes": {}}
    test, calibration = batch(8), [batch(8) for _ in range(4)]
    x, reference = test[:1], one_by_one(model, test)
    if "qat" in modes and not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        modes = [m for m in modes if m != "qat"]
    try:
        captured = qf.export(model, (x,), dynamic_batch=True).module()
    except qf.QuantflowError:  # the graph is specialized to the batch size of the capture, as Swin's is
        captured = qf.export(model, (x,)).module()
        calibration = [image for several in calibration for image in several.split(1)]
    result["parameters"] = sum(parameter.numel() for parameter in model.parameters())
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
    optimizer = torch.optim.SGD(graph.train().parameters(), 1e-4)
    first(graph(x)).square().mean().backward()
    optimizer.step()


def first(output: Any) -> Any:
    """The main output, the only one that is compared."""
    return next(iter(output.values())) if isinstance(output, dict) else output


def one_by_one(graph: Any, images: Any) -> Any:
    with torch.no_grad():
        return torch.cat([first(graph(image)) for image in images.split(1)])


def integer_share(graph: Any) -> float:
    from quantflow.graph.aten import LINEARS, WEIGHTED, argument, op, value

    total = integers = 0
    for node in graph.graph.nodes:
        if op(node) not in WEIGHTED:
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
    from peers import stock_calibrate, stock_prepared
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e

    prepared = stock_prepared(captured.eval(), calibration[:1])
    stock_calibrate(prepared, calibration)
    with torch.no_grad():
        return sqnr(reference, first(convert_pt2e(prepared)(test)))
