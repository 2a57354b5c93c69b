"""``recover``: equalization, range optimization and weight reconstruction, kept if they improve held-out outputs."""

from __future__ import annotations

import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace

from torch.fx import GraphModule

from quantflow.data.batches import PickInputs
from quantflow.data.sample import Inputs, Sample
from quantflow.errors import QuantflowWarning
from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.observers.observation import is_fake_quantizer, observers_of
from quantflow.preparation.forms import make_trainable, ptq_form
from quantflow.ptq.equalization.prepared_equalization import equalize_prepared
from quantflow.ptq.held_out import HeldOut, why_not_sampled
from quantflow.ptq.range_optimization import optimize_ranges
from quantflow.ptq.weight_reconstruction.weight_reconstruction import reconstruct_weights
from quantflow.simulation.float_weights import remember_teacher, with_float_weights
from quantflow.simulation.output_gradients import OutputGradients, output_gradients
from quantflow.simulation.preconditions import check_calibrated, draw


@dataclass(frozen=True)
class Step:
    """One step that recovery tried.

    Attributes:
        name: The name of the step.
        sqnr: Signal to noise of the outputs after it, dB, simulated on held-out batches (with one batch, on that batch); NaN
            where nothing was measured.
        kept: Whether the graph has it.
        seconds: The seconds that it took.

    Example:
        >>> from quantflow.ptq import Step
        >>> step = Step("weight reconstruction", sqnr=31.5, kept=True, seconds=0.2)
        >>> print(step)
        weight reconstruction: 31.5 dB (0.2 s)
    """

    name: str
    sqnr: float
    kept: bool
    seconds: float = 0.0

    def __str__(self) -> str:
        if math.isnan(self.sqnr):
            return self.name
        return f"{self.name}: {self.sqnr:.1f} dB{'' if self.kept else ', not kept'} ({self.seconds:.1f} s)"


@dataclass(frozen=True)
class RecoveryResult:
    """A prepared graph after recovery, and the steps that were tried on it.

    Attributes:
        graph: The graph, prepared and calibrated as before; convert it.
        steps: The steps that were tried, in order; the first is the graph as it came.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> data = [torch.randn(8, 8) for _ in range(4)]
        >>> graph = qf.export(torch.nn.Linear(8, 4).eval(), (data[0],), dynamic_batch=True).module()
        >>> prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), data, progress=False)
        >>> recovered = qf.recover(prepared, data, progress=False)
        >>> [step.name for step in recovered.steps]
        ['as calibrated', 'range optimization', 'weight reconstruction']
    """

    graph: TrainableGraphModule
    steps: tuple[Step, ...]

    @property
    def sqnr(self) -> float:
        """The signal to noise of the outputs of the graph, dB, as the last step that it has measured it."""
        return _last_kept(self.steps).sqnr

    def to_json(self) -> str:
        """Return the steps as a JSON object; a signal to noise that is not finite is null."""
        steps = [asdict(s) | {"sqnr": s.sqnr if math.isfinite(s.sqnr) else None} for s in self.steps]
        return json.dumps({"steps": steps}, indent=2)

    def __str__(self) -> str:
        return "recovery\n" + "\n".join(f"  {step}" for step in self.steps)


def recover(
    graph: GraphModule,
    data: Sample | Iterable[object],
    *,
    inputs: PickInputs | None = None,
    progress: bool = True,
) -> RecoveryResult:
    """Equalize channels, optimize activation ranges by output gradients, reconstruct weights and biases on quantized inputs.

    The signal to noise of the simulated outputs is measured after each step, on every eighth batch, to which nothing is fitted
    (of fewer than eight batches on the last; of one batch on that batch). A step is kept where it rises. Equalization, which
    is tried where it lowers the predicted rounding noise, is what the later steps build on: it is kept where the float network
    stays, and dropped with them if all together do not improve the outputs.

    A graph that keeps state is recovered on single calls, each from the state that the float network had before it in
    ``data``; what is measured then is the outputs and the change of the state. A graph in which the examples of a batch act on
    each other stays as calibrated, since the batches of a sample hold other examples together.

    Args:
        graph: A prepared and calibrated graph, by :func:`quantflow.prepare` or stock ``prepare_pt2e``; it is left as it was. Of
            a graph prepared for QAT, batch norm is folded, and training starts from the recovered weights and ranges.
        data: The sample that :func:`quantflow.calibrate` drew, or batches to draw one from; labels are not used.
        inputs: Picks the inputs out of a batch, where that is ambiguous.
        progress: Show progress bars.

    Returns:
        The graph and the steps that were tried.

    Raises:
        QuantflowError: at stage ``"recover"``, when the graph is not prepared or not calibrated, there is no data, or a batch
            does not fit it.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantizers import XNNPACKQuantizer
        >>> data = [torch.randn(8, 8) for _ in range(4)]
        >>> graph = qf.export(torch.nn.Linear(8, 4).eval(), (data[0],), dynamic_batch=True).module()
        >>> prepared = qf.calibrate(qf.prepare(graph, XNNPACKQuantizer()), data, progress=False)
        >>> recovered = qf.recover(prepared, data, progress=False)
        >>> converted = qf.convert(recovered.graph)
        >>> recovered.steps[0].name, recovered.steps[0].kept
        ('as calibrated', True)
    """
    check_calibrated(graph, "recover", trainable=True)
    fake_quantizers = [module for module in observers_of(graph).values() if is_fake_quantizer(module)]
    current = ptq_form(graph) if fake_quantizers else adopt(graph)
    training = current.training  # a graph that stock torchao prepared says True in inference mode
    current.eval()

    def as_calibrated(reason: str) -> RecoveryResult:
        unchanged = adopt(graph)
        remember_teacher(unchanged)
        return RecoveryResult(unchanged, (Step(f"as calibrated, since {reason}", math.nan, kept=True),))

    drawn = draw(current, data, stage="recover", inputs=inputs)
    if reason := why_not_sampled(current, drawn):
        return as_calibrated(reason)
    held_out = HeldOut(current, drawn)
    fit = held_out.fit
    steps = [Step("as calibrated", held_out.sqnr(current), kept=True)]
    calibrated = current

    def attempt(name: str, make: Callable[[TrainableGraphModule], TrainableGraphModule]) -> None:
        nonlocal current
        start = time.perf_counter()
        candidate = make(current)
        sqnr = held_out.sqnr(candidate)
        kept = sqnr > _last_kept(steps).sqnr
        steps.append(Step(name, sqnr, kept, time.perf_counter() - start))
        if kept:
            current = candidate

    start = time.perf_counter()
    equal = equalize_prepared(current, fit, progress=progress)
    if equal is not None:
        same = held_out.sqnr(with_float_weights(equal), integers=False) > _SAME
        steps.append(Step("equalization", held_out.sqnr(equal), same, time.perf_counter() - start))
        current = equal if same else current
    gradients = _output_gradients(current, fit, progress)
    if gradients is not None:
        attempt("range optimization", lambda graph: optimize_ranges(graph, gradients))
    attempt("weight reconstruction", lambda graph: reconstruct_weights(graph, fit, gradients, progress=progress))
    if _last_kept(steps).sqnr < steps[0].sqnr:
        current, steps = calibrated, [steps[0], *(replace(step, kept=False) for step in steps[1:])]
    best = _last_kept(steps).sqnr
    if best < _NOTHING:
        size = max((float(t.abs().max()) for found in held_out.reference for t in found if t.numel()), default=0.0)
        reason = f"integers keep nothing of the outputs, {best:.1f} dB; in float these reach {size:.2g}"
        remedy = (
            "trained weights and batch norm statistics, calibration data like the model's own; qf.diagnose names layers"
        )
        warnings.warn(QuantflowWarning("recover", reason, node="the outputs", remedy=remedy), stacklevel=2)
    remember_teacher(current)
    if fake_quantizers:
        kinds = {type(m) for m in fake_quantizers if isinstance(m, FakeQuantize) and not m.is_dynamic}
        make_trainable(current, kinds.pop() if len(kinds) == 1 else FakeQuantize)
    return RecoveryResult(current.train(training), tuple(steps))


_NOTHING = 0.1  # dB: as much noise as signal
_SAME = 40.0  # dB: a float network that was equalized, beside itself


def _last_kept(steps: Sequence[Step]) -> Step:
    return [step for step in steps if step.kept][-1]


def _output_gradients(graph: GraphModule, sample: Sequence[Inputs], progress: bool) -> OutputGradients | None:
    try:
        return output_gradients(graph, sample, progress=progress)
    except RuntimeError as error:  # an operator without a gradient
        reason = f"no gradient to choose ranges by: {str(error).splitlines()[0]}"
        remedy = "ranges stay as calibrated; nothing else is lost"
        warnings.warn(QuantflowWarning("recover", reason, remedy=remedy), stacklevel=3)
        return None
