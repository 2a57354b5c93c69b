"""The four paths from a network to a program, and the checks of each."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

import quantflow as qf
from fuzzing.compare import Compared, compare
from fuzzing.network import Network
from fuzzing.rounding import Call, Outputs, float_noise, one_step_noise, outputs_of
from fuzzing.training import compare_training, train
from quantflow.observers.fake_quantize import FakeQuantize
from quantizers import XNNPACKQuantizer

FLOAT_DB, INTEGER_DB, KEPT_DB = 60.0, 35.0, 15.0
_STEP_MARGIN = 2.0


@dataclass
class Held:
    """The result of a path: the comparison of each check by name, and the warnings of quantflow."""

    laws: dict[str, Compared] = field(default_factory=dict)
    warned: list[str] = field(default_factory=list)


def walk(network: Network, path: str) -> Held:
    """Run ``network`` through ``path`` and measure its checks.

    Raises:
        Exception: any exception of quantflow or below it.
    """
    model, calls = network.build()
    held = Held()
    with warnings.catch_warnings(record=True) as caught, torch.random.fork_rng(devices=[]):
        warnings.simplefilter("always")
        torch.manual_seed(network.seed)
        try:
            PATHS[path](model, calls, held.laws, network.seed)
        finally:
            held.warned = [str(w.message) for w in caught if isinstance(w.message, qf.QuantflowWarning)]
    return held


def _float(model: nn.Module, calls: Sequence[Call], laws: dict[str, Compared], seed: int) -> None:
    args, kwargs = copy.deepcopy(calls[0])
    expected = outputs_of(copy.deepcopy(model), calls)
    noise = functools.cache(lambda: float_noise(model, calls))
    exported = qf.export(model, args, kwargs)
    laws["captured"] = compare(expected, outputs_of(exported.module(), calls), FLOAT_DB, noise)
    program = exported.to_core_aten().to_edge("xnnpack").to_executorch()
    laws[".pte"] = compare(expected, outputs_of(program, calls), FLOAT_DB, noise)


def _ptq(model: nn.Module, calls: Sequence[Call], laws: dict[str, Compared], seed: int) -> None:
    args, kwargs = copy.deepcopy(calls[0])
    expected = outputs_of(copy.deepcopy(model), calls)
    graph = qf.export(model, args, kwargs).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer())
    noise = functools.cache(lambda: float_noise(model, calls))
    laws["prepared"] = compare(expected, outputs_of(copy.deepcopy(prepared), calls), FLOAT_DB, noise)
    qf.calibrate(prepared, data_of(calls), progress=False)
    _lower(qf.convert(prepared), calls, laws, model)


def _qat(model: nn.Module, calls: Sequence[Call], laws: dict[str, Compared], seed: int) -> None:
    args, kwargs = copy.deepcopy(calls[0])
    graph = qf.export(model, args, kwargs).module()
    prepared = qf.prepare(graph, XNNPACKQuantizer(), qat=True)
    unrounded = copy.deepcopy(prepared)
    for module in unrounded.modules():
        if isinstance(module, FakeQuantize):
            module.enable_fake_quant(False)
    laws.update(compare_training(copy.deepcopy(model), unrounded, calls, seed))
    if seed % 2:
        qf.calibrate(prepared, data_of(calls), progress=False)
    train(prepared, calls)
    prepared.eval()
    fake = outputs_of(copy.deepcopy(prepared), calls)
    converted = qf.convert(prepared)
    noise = _steps(converted, calls)
    laws["fake-quantized"] = compare(fake, outputs_of(copy.deepcopy(converted), calls), INTEGER_DB, noise, _STEP_MARGIN)
    _lower(converted, calls, laws, None)


def _quantize(model: nn.Module, calls: Sequence[Call], laws: dict[str, Compared], seed: int) -> None:
    args, kwargs = copy.deepcopy(calls[0])
    result = qf.quantize(model, args, data_of(calls), kwargs, progress=False)
    converted = copy.deepcopy(result.graph)
    expected = outputs_of(converted, calls)
    noise = _steps(result.graph, calls)
    laws[".pte"] = compare(expected, outputs_of(result.program, calls), INTEGER_DB, noise, _STEP_MARGIN)
    _keeps(model, expected, calls, laws, result.graph)


def _lower(converted: GraphModule, calls: Sequence[Call], laws: dict[str, Compared], model: nn.Module | None) -> None:
    args, kwargs = copy.deepcopy(calls[0])
    expected = outputs_of(copy.deepcopy(converted), calls)
    if model is not None:
        _keeps(model, expected, calls, laws, converted)
    program = qf.export(copy.deepcopy(converted), args, kwargs).to_core_aten().to_edge("xnnpack").to_executorch()
    noise = _steps(converted, calls)
    laws[".pte"] = compare(expected, outputs_of(program, calls), INTEGER_DB, noise, _STEP_MARGIN)


def _keeps(
    model: nn.Module, expected: Outputs, calls: Sequence[Call], laws: dict[str, Compared], converted: GraphModule
) -> None:
    """Check that the converted graph differs from the model by no more than rounding of all activations explains."""
    noise = functools.cache(lambda: one_step_noise(converted, calls, share=1.0, draws=4))
    eager = outputs_of(copy.deepcopy(model), calls)
    laws["converted"] = compare(expected, eager, KEPT_DB, noise, integers=False)


def _steps(converted: GraphModule, calls: Sequence[Call]) -> Callable[[], Any]:
    return functools.cache(lambda: one_step_noise(converted, calls))


def data_of(calls: Sequence[Call]) -> list[Any]:
    """The inputs of the calls as calibration batches."""
    batches: list[Any] = []
    for args, kwargs in copy.deepcopy(list(calls)):
        batches.append({**{f"x{i}": a for i, a in enumerate(args)}, **kwargs} if kwargs else args)
    return batches


PATHS = {"float": _float, "ptq": _ptq, "qat": _qat, "quantize": _quantize}
