"""``search``: post-training quantization with a precision for each layer."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from quantflow.analysis.layers import Within
from quantflow.capture.export import export
from quantflow.data.batches import PickInputs
from quantflow.delegates import DelegateLike
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.mixed_precision.measure import Subject, measured
from quantflow.mixed_precision.search_result import SearchResult
from quantflow.mixed_precision.solve import frontier, solve
from quantflow.pipeline.default_quantizer import default_quantizer
from quantflow.pipeline.quantize import quantize


def search(
    model: nn.Module,
    args: Sequence[object],
    data: Iterable[object],
    kwargs: Mapping[str, object] | None = None,
    *,
    max_bytes: int | None = None,
    max_ms: float | None = None,
    quantizer: Any = None,
    precisions: Mapping[str, object] | None = None,
    delegate: DelegateLike = "xnnpack",
    inputs: PickInputs | None = None,
    recover: bool = True,
    progress: bool = True,
) -> SearchResult:
    """Quantize after training with a precision for each layer: the least noise under a limit of bytes or of milliseconds.

    Noise is measured at the network's outputs with one layer at a time quantized; bytes and milliseconds by the difference
    that one layer makes to a real program. All three are assumed to add up over the layers; under that assumption the choice
    is exact. A warning says where the program that is built exceeds a limit.

    Args:
        model: An eager model.
        args: Example positional inputs, a tuple; programs are lowered for their shapes.
        data: Calibration batches that can be gone through again, as for :func:`quantflow.calibrate`.
        kwargs: Example keyword inputs.
        max_bytes: The most bytes that the ``.pte`` may have.
        max_ms: The most milliseconds that the median call on the example inputs may take, on this machine; of several
            processes the mean of what they measure counts.
        quantizer: A quantizer with overrides by layer; by default the one registered for ``delegate``. Operators without
            weights keep its scheme.
        precisions: Schemes by name, None for float; by default those of the quantizer (``quantizer.precisions``).
        delegate: The delegate to lower to, as in ``CoreAten.to_edge``.
        inputs: Picks the inputs out of a batch, where that is ambiguous.
        recover: As in :func:`quantflow.quantize`, for the program that is built.
        progress: Show progress bars.

    Returns:
        The program that was built, the choice for each layer, and all that was measured.

    Raises:
        QuantflowError: at stage ``"search"``, when there is no limit or none can be kept, the float program keeps the limit,
            ``precisions`` is no mapping, the data can be gone through once only, the quantizer has no overrides, no layer has
            weights, or a layer can have none of the precisions.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64)).eval()
        >>> x, data = torch.randn(1, 64), [torch.randn(8, 64)]
        >>> found = qf.search(model, (x,), data, max_bytes=50_000, recover=False, progress=False)
        >>> [choice.layer for choice in found.chosen], len(found.result.program.buffer) <= 50_000
        (['0', '2'], True)
    """
    if max_bytes is None and max_ms is None:
        remedy = "max_bytes=..., max_ms=..., or both"
        raise QuantflowError("search", "there is no limit to keep", node="max_bytes", remedy=remedy)
    if iter(data) is data:
        remedy = "pass a list of batches or a DataLoader"
        raise QuantflowError("search", "the data can be gone through once only", node="data", remedy=remedy)
    quantizer = quantizer or default_quantizer(delegate)
    if not hasattr(quantizer, "overriding"):
        reason, remedy = (
            f"{type(quantizer).__name__} has no overrides by layer",
            "pass one that has, as XNNPACKQuantizer()",
        )
        raise QuantflowError("search", reason, node="quantizer", remedy=remedy)
    _check(precisions)
    graph = export(model, args, kwargs, dynamic_batch=True).module().eval()
    subject = Subject(graph, args, kwargs, data, quantizer, delegate, inputs)
    asked = precisions is not None
    precisions = quantizer.precisions if precisions is None else precisions
    table = measured(subject, precisions, timed=max_ms is not None, progress=progress).agreed()
    if asked and (idle := [name for name in precisions if not any(c.precision == name for c in table.choices)]):
        reason, remedy = "no layer can have it", "print(quantizer.overriding(...).plan(graph)) tells why"
        warnings.warn(QuantflowWarning("search", reason, node=", ".join(idle), remedy=remedy), stacklevel=2)
    chosen = solve(table, max_bytes=max_bytes, max_ms=max_ms)
    mixed = quantizer.overriding([(Within(c.layer), precisions[c.precision]) for c in chosen])
    if not mixed.plan(graph).integer:
        remedy = "lower the float model: qf.export(model, args).to_core_aten().to_edge(delegate).to_executorch()"
        raise QuantflowError("search", "the float program keeps the limit", node="limit", remedy=remedy)
    common: dict[str, Any] = {"delegate": delegate, "inputs": inputs, "recover": recover, "progress": progress}
    # The precisions are chosen: none is to be fallen back from.
    result = quantize(model, args, data, kwargs, quantizer=mixed, min_sqnr=None, **common)
    size = len(result.program.buffer)
    if max_bytes is not None and size > max_bytes:
        reason = f"the program has {size:,} bytes; {table.total(chosen)[1]:,} were predicted and {max_bytes:,} allowed"
        warnings.warn(QuantflowWarning("search", reason, node="the program", remedy="lower max_bytes"), stacklevel=2)
    time = None if max_ms is None else subject.milliseconds(result.program)
    if max_ms is not None and time is not None and time > max_ms:
        reason = f"a call takes {time:.2f} ms; {table.total(chosen)[2]:.2f} were predicted and {max_ms} allowed"
        warnings.warn(QuantflowWarning("search", reason, node="the program", remedy="lower max_ms"), stacklevel=2)
    return SearchResult(result, chosen, table, frontier(table), time)


def _check(precisions: object) -> None:
    if precisions is not None and (not isinstance(precisions, Mapping) or not precisions):
        remedy = 'by name, as {"float": None, "int8": INT8}'
        raise QuantflowError("search", "no precisions to choose from", node="precisions", remedy=remedy)
