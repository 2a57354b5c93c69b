"""Precisions to fall back to where the outputs of a quantized model have too little signal to noise."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from torchao.quantization.pt2e.quantizer import Quantizer

from quantflow.analysis import LayerCost, Sensitivities, sensitivity
from quantflow.analysis.accuracy_control import fewest
from quantflow.analysis.layers import Within, layer_name, still_quantized
from quantflow.analysis.sensitivity import OutputNoise
from quantflow.analysis.sqnr_control import SqnrControl
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.aten import LINEARS, op
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.graph.rewrites.weights import EQUAL_WEIGHTS
from quantflow.pipeline.job import Job, Quantized
from quantflow.ptq import smooth
from quantflow.ptq.smoothquant.smoothquant import smooths_norms
from quantflow.simulation.partial import PartialNetwork
from quantflow.simulation.preconditions import draw

_LEAST = 20.0  # dB: classes of a classifier then agree with float in about 19 of 20 examples
_RECOVERED = 10.0  # dB: recovery is tried where it may give as many and reach the least signal to noise
_NEAR = 10.0  # dB: a layer is to blame if it alone comes as near to the least signal to noise
_NAMED = 5  # the number of layers that a warning names


@dataclass(frozen=True)
class _Attempt:
    """One attempt: the model that was quantized, and how."""

    name: str
    graph: TrainableGraphModule
    made: Quantized
    dynamic: tuple[str, ...] = ()
    floating: tuple[str, ...] = ()


def hold_sqnr(
    job: Job, quantizer: Quantizer, min_sqnr: float | Literal["auto"] | None
) -> tuple[Quantized, SqnrControl | None]:
    """Return the model as ``quantizer`` plans it, or the cheapest that :func:`quantflow.quantize` falls back to whose outputs
    have ``min_sqnr``.

    Recovery, which takes most of the time, is for attempts that hold or may hold with it, and for what is kept.

    Args:
        job: The captured model and the data.
        quantizer: The quantizer.
        min_sqnr: The least signal to noise, dB, or ``"auto"`` or None.

    Returns:
        What to lower, and what was measured; None where nothing was asked for or can be measured.
    """
    bits = getattr(getattr(getattr(quantizer, "scheme", None), "weight", None), "bits", 8)
    if min_sqnr == "auto":
        min_sqnr = _LEAST if bits >= 8 else None
    if min_sqnr is None:
        return job.quantized(quantizer), None
    first = job.calibrated(quantizer)
    if math.isnan(first.sqnr):
        return job.recovered(first), None
    search = _Search(job, first, min_sqnr)
    if not search.holds:
        search.run()
    best = replace(search.best, made=job.recovered(search.best.made))
    blamed: tuple[str, ...] = ()
    if best.made.sqnr < min_sqnr:
        blamed = tuple(cost.layer for cost in search.costs.layers[:_NAMED])
        reason = (
            f"the outputs have {best.made.sqnr:.1f} dB of signal to noise, {best.name}; {min_sqnr:g} were asked for"
        )
        remedy = "train the quantized graph (qf.train), more calibration data, or min_sqnr=None; qf.diagnose shows the layers"
        warnings.warn(QuantflowWarning("quantize", reason, node=", ".join(blamed), remedy=remedy), stacklevel=3)
    tried = tuple((name, best.made.sqnr if name == best.name else sqnr) for name, sqnr in search.tried)
    control = SqnrControl(min_sqnr, best.made.sqnr, tried, best.name, best.dynamic, best.floating, blamed)
    return best.made, control


def _is_static_linear(decision: Any) -> bool:
    scheme, node = decision.scheme, decision.node
    linear = op(node) in LINEARS and EQUAL_WEIGHTS not in node.meta
    return linear and scheme is not None and not scheme.activation.dynamic


class _Search:
    """Attempts in the order of what they cost, until one holds.

    Attributes:
        best: The attempt that holds, or the one with the most signal.
        tried: The name and the signal to noise of each attempt.
    """

    def __init__(self, job: Job, first: Quantized, min_sqnr: float) -> None:
        self.job, self.first, self.min_sqnr = job, first, min_sqnr
        self.best = _Attempt("as planned", job.graph, self._recovered(first))
        self.tried = [(self.best.name, self.best.made.sqnr)]

    @property
    def holds(self) -> bool:
        return self.best.made.sqnr >= self.min_sqnr

    def _recovered(self, calibrated: Quantized) -> Quantized:
        """``calibrated`` after recovery, if it may hold then."""
        return self.job.recovered(calibrated) if calibrated.sqnr >= self.min_sqnr - _RECOVERED else calibrated

    @cached_property
    def costs(self) -> Sensitivities:
        """The costs of the layers as planned."""
        return sensitivity(self.first.calibrated, self.first.sample, batches=2, progress=self.job.progress)

    def run(self) -> None:
        """Try what applies, until it holds. Each attempt goes through the data again."""
        if iter(self.job.data) is self.job.data:
            return
        quantizer: Any = self.first.quantizer
        if smooths_norms(self.job.graph):
            self._try("smoothed behind norms", quantizer, graph=smooth(self.job.graph, self.first.sample))
        if self.holds or not hasattr(quantizer, "overriding"):
            return
        self._try_dynamic()
        if self.holds:
            return
        start: Any = self.best
        for floating in self._growing_sets():
            names = [(Within(name), None) for name in floating]
            what = f"{len(floating)} layers in float" if len(floating) > 1 else f"{floating[0]} in float"
            self._try(what, start.made.quantizer.overriding(names), start.dynamic, floating)
            if self.holds:
                return

    def _choosable(self) -> list[LayerCost]:
        """The layers whose precision no override gives, the costliest first."""
        decisions = getattr(self.first.plan, "decisions", ())
        given = {layer_name(d.node) for d in decisions if d.override is not None}
        return [cost for cost in self.costs.layers if cost.layer not in given]

    def _try_dynamic(self) -> None:
        """Try dynamic activations for the linear layers to blame, then for all, with float between them."""
        quantizer: Any = self.first.quantizer
        if getattr(quantizer, "dynamic", None) is None:
            return
        able = {layer_name(d.node) for d in self.first.plan.decisions if _is_static_linear(d)}
        ranked = [cost for cost in self._choosable() if cost.layer in able] if able else []
        blamed = tuple(cost.layer for cost in ranked if cost.to_integers < self.min_sqnr + _NEAR)
        if blamed:
            overrides = [(Within(name, LINEARS), quantizer.dynamic) for name in blamed]
            self._try(f"dynamic activations in {len(blamed)} linear layers", quantizer.overriding(overrides), blamed)
        if ranked and not self.holds and not quantizer.overrides:
            every = tuple(cost.layer for cost in ranked)
            self._try(
                "dynamic activations, and float between linear layers", quantizer.with_scheme(quantizer.dynamic), every
            )

    def _growing_sets(self) -> list[tuple[str, ...]]:
        """Sets of layers to leave in float, doubling, among them the fewest that hold in simulation without recovery."""
        decisions = getattr(self.best.made.plan, "decisions", ())
        quantized = {layer_name(d.node) for d in decisions if d.scheme is not None}
        order = [cost.layer for cost in self._choosable() if cost.layer in quantized][:-1]
        if not order:
            return []
        calibrated = self.best.made.calibrated
        drawn = draw(calibrated, self.best.made.sample, stage="quantize")[:2]
        networks = [PartialNetwork(calibrated, batch, ()) for batch in drawn]

        def simulated(floating: Sequence[str]) -> bool:
            noise, active = OutputNoise(), still_quantized(calibrated, floating)
            for network in networks:
                noise.add(network.returned, network.outputs(active))
            return noise.sqnr >= self.min_sqnr

        # Fewer may do, since each float layer also removes roundings of its neighbours.
        chosen = fewest(order, simulated)
        ranked = [*chosen, *(name for name in order if name not in chosen)]
        most = max(len(chosen), len(order) // 2)
        sizes = {min(2**power, most) for power in range(most.bit_length() + 1)} | {len(chosen)}
        return [tuple(ranked[:size]) for size in sorted(sizes)]

    def _try(
        self,
        name: str,
        quantizer: Any,
        dynamic: Sequence[str] = (),
        floating: Sequence[str] = (),
        graph: TrainableGraphModule | None = None,
    ) -> None:
        graph = self.best.graph if graph is None else graph
        try:
            made = self._recovered(self.job.calibrated(quantizer, graph))
            attempt = _Attempt(name, graph, made, tuple(dynamic), tuple(floating))
        except QuantflowError as error:
            if error.stage not in ("plan", "prepare"):
                raise
            return  # the quantizer has no such precision, or nothing is left to quantize
        self.tried.append((name, attempt.made.sqnr))
        if attempt.made.sqnr > self.best.made.sqnr:
            self.best = attempt
