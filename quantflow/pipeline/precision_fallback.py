"""Precisions to fall back to where the outputs of a quantized model have too little signal to noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from quantflow.analysis import Sensitivities, sensitivity
from quantflow.analysis.accuracy_control import fewest
from quantflow.analysis.layers import Within, layer_name, still_quantized
from quantflow.analysis.sensitivity import OutputNoise
from quantflow.analysis.sqnr_control import SqnrControl
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.aten import LINEARS, op
from quantflow.pipeline.job import Job, Quantized
from quantflow.ptq import smooth
from quantflow.ptq.smoothquant.smoothquant import smooths_norms
from quantflow.simulation.partial import PartialNetwork
from quantflow.simulation.preconditions import draw

_LEAST = 20.0  # dB: classes of a classifier then agree with float in about 19 of 20 examples
_NEAR = 10.0  # dB: a layer is to blame if it alone comes as near to the least signal to noise
_NAMED = 5  # the number of layers that a warning names
_GROWTH = 2  # of the number of float layers from one attempt to the next


@dataclass(frozen=True)
class _Attempt:
    name: str
    made: Quantized
    dynamic: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()


def hold_sqnr(
    job: Job, first: Quantized, min_sqnr: float | Literal["auto"] | None
) -> tuple[Quantized, SqnrControl | None]:
    """Return ``first``, or the cheapest that :func:`quantflow.quantize` falls back to whose outputs have ``min_sqnr``.

    Args:
        job: The captured model and the data.
        first: The model as the quantizer planned it.
        min_sqnr: The least signal to noise, dB, or ``"auto"`` or None.

    Returns:
        What to lower, and what was measured; None where nothing was asked for or can be measured.
    """
    bits = getattr(getattr(getattr(first.quantizer, "scheme", None), "weight", None), "bits", 8)
    if min_sqnr == "auto":
        min_sqnr = _LEAST if bits >= 8 else None
    if min_sqnr is None or math.isnan(first.sqnr):
        return first, None
    search = _Search(job, first, min_sqnr)
    if not search.holds:
        search.run()
    best = search.best
    blamed: tuple[str, ...] = ()
    if not search.holds:
        blamed = tuple(cost.layer for cost in search.costs().layers[:_NAMED])
        reason = (
            f"the outputs have {best.made.sqnr:.1f} dB of signal to noise, {best.name}; {min_sqnr:g} were asked for"
        )
        remedy = "train the quantized graph (qf.train), more calibration data, or min_sqnr=None; qf.diagnose shows the layers"
        warnings.warn(QuantflowWarning("quantize", reason, node=", ".join(blamed), remedy=remedy), stacklevel=3)
    tried = tuple((attempt.name, attempt.made.sqnr) for attempt in search.tried)
    return best.made, SqnrControl(min_sqnr, best.made.sqnr, tried, best.name, best.dynamic, best.floating, blamed)


def _is_static_linear(decision: Any) -> bool:
    scheme = decision.scheme
    return op(decision.node) in LINEARS and scheme is not None and not scheme.activation.dynamic


class _Search:
    """Attempts in the order of what they cost, until one holds."""

    def __init__(self, job: Job, first: Quantized, min_sqnr: float) -> None:
        self.job, self.first, self.min_sqnr = job, first, min_sqnr
        self.tried = [_Attempt("as planned", first)]
        self._costs: Sensitivities | None = None

    @property
    def best(self) -> _Attempt:
        """The attempt that holds, which is the last, or the one with the most signal."""
        return self.tried[-1] if self.holds else max(self.tried, key=lambda attempt: attempt.made.sqnr)

    @property
    def holds(self) -> bool:
        return self.tried[-1].made.sqnr >= self.min_sqnr

    def costs(self) -> Sensitivities:
        """The costs of the layers as planned."""
        if self._costs is None:
            first = self.first
            self._costs = sensitivity(first.calibrated, first.sample, batches=2, progress=self.job.progress)
        return self._costs

    def run(self) -> None:
        """Try what applies, until it holds."""
        quantizer: Any = self.first.quantizer
        if smooths_norms(self.job.graph):
            smoothed = smooth(self.job.graph, self.first.sample)
            self._try("smoothed behind norms", quantizer, graph=smoothed)
        if self.holds or not hasattr(quantizer, "overriding"):
            return
        dynamic = self._dynamic()
        if self.holds:
            return
        overrides = [(Within(name, LINEARS), quantizer.dynamic) for name in dynamic]
        for floating in self._fewer_integers(dynamic):
            names = [(Within(name), None) for name in floating]
            what = f"{len(floating)} layers in float" if len(floating) > 1 else f"{floating[0]} in float"
            self._try(what, quantizer.overriding([*overrides, *names]), dynamic, floating)
            if self.holds:
                return

    def _dynamic(self) -> tuple[str, ...]:
        """Try dynamic activations for the linear layers to blame, then for all; return the layers of the better attempt."""
        quantizer: Any = self.first.quantizer
        if getattr(quantizer, "dynamic", None) is None:
            return ()
        able = {layer_name(d.node) for d in self.first.plan.decisions if _is_static_linear(d)}
        ranked = [cost for cost in self.costs().layers if cost.layer in able] if able else []
        blamed = tuple(cost.layer for cost in ranked if cost.to_integers < self.min_sqnr + _NEAR)
        for names in dict.fromkeys((blamed, tuple(cost.layer for cost in ranked))):
            if names:
                overrides = [(Within(name, LINEARS), quantizer.dynamic) for name in names]
                what = f"dynamic activations in {len(names)} linear layers"
                self._try(what, quantizer.overriding(overrides), names)
            if self.holds:
                break
        return self.best.dynamic

    def _fewer_integers(self, dynamic: Sequence[str]) -> list[tuple[str, ...]]:
        """Sets of layers to leave in float, growing: the fewest that hold in simulation without recovery, then more."""
        order = [cost.layer for cost in self.costs().layers if cost.layer not in dynamic][:-1]
        if not order:
            return []
        calibrated = self.best.made.calibrated
        drawn = draw(calibrated, self.best.made.sample, stage="quantize", inputs=self.job.inputs)[:2]

        def simulated(floating: Sequence[str]) -> bool:
            noise, active = OutputNoise(), still_quantized(calibrated, floating)
            for batch in drawn:
                noise.add(
                    PartialNetwork(calibrated, batch, ()).returned, PartialNetwork(calibrated, batch, active).returned
                )
            return noise.sqnr >= self.min_sqnr

        count = len(fewest(order, simulated))
        sizes = []
        while count < len(order) // 2:
            sizes.append(count)
            count *= _GROWTH
        return [tuple(order[:size]) for size in (*sizes, max(1, len(order) // 2))]

    def _try(
        self, name: str, quantizer: Any, dynamic: Sequence[str] = (), floating: Sequence[str] = (), graph: Any = None
    ) -> None:
        try:
            made = self.job.quantized(quantizer, graph)
        except QuantflowError as error:
            if error.stage not in ("plan", "prepare"):
                raise
            return  # the quantizer has no such precision, or nothing is left to quantize
        self.tried.append(_Attempt(name, made, tuple(dynamic), tuple(floating)))
