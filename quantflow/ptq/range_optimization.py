"""Range optimization: activation ranges with the least error at the network's outputs, to first order."""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule

from quantflow.graph.graph_module import TrainableGraphModule, adopt
from quantflow.observers import FixedQParamsObserver
from quantflow.observers.observation import AffineObserver, affine, qparams_of_range, replace_observers
from quantflow.simulation.output_gradients import BINS, OutputGradients, ValueGradients

_SHRINK = torch.logspace(0, -4, 49, base=2.0)  # 1 to 1/16
_ROUNDS = 3


def optimize_ranges(graph: GraphModule, gradients: OutputGradients) -> TrainableGraphModule:
    """Return a copy of ``graph`` in which each activation's range has the least error at the outputs, to first order.

    A narrow range rounds more finely and saturates more values. Rounding errors count as noise, each by its squared gradient;
    those of saturation are added up over an example before they are squared, since they have one sign: a few clipped outliers
    that no output depends on cost nothing, however large. (Choosing ranges by a loss of the whole network: Nahshan et al. 2019,
    arXiv:1911.07190; gradients as weights of errors: Li et al. 2021, BRECQ, arXiv:2102.05426.)

    Args:
        graph: A prepared and calibrated graph; it is left as it was.
        gradients: What :func:`quantflow.ptq.output_gradients` found for it.

    Returns:
        The copy, with a ``FixedQParamsObserver`` for each activation that the outputs depend on.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> from quantflow.ptq import optimize_ranges, output_gradients
        >>> from quantizers import XNNPACKQuantizer
        >>> model, sample = torch.nn.Linear(8, 4).eval(), qf.Sample()
        >>> graph = qf.export(model, (torch.randn(1, 8),), dynamic_batch=True).module()
        >>> prepared = qf.prepare(graph, XNNPACKQuantizer())
        >>> _ = qf.calibrate(prepared, [torch.randn(16, 8)], sample=sample, progress=False)
        >>> optimized = optimize_ranges(prepared, output_gradients(prepared, sample.batches(), progress=False))
        >>> sum(type(module).__name__ == "FixedQParamsObserver" for module in optimized.modules())
        2
    """
    fixed = adopt(graph)
    names = {module: name for name, module in graph.named_modules()}
    made: dict[nn.Module, nn.Module] = {}
    for observer, of_value in gradients.values.items():
        if not of_value.sums:
            continue  # no output depends on it
        found = optimal_qparams(affine(observer), of_value)
        made[fixed.get_submodule(names[observer])] = FixedQParamsObserver.like(observer, *found)
    replace_observers(fixed, made)
    return fixed


def optimal_qparams(observer: AffineObserver, of_value: ValueGradients) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and zero point for the tensors of ``observer`` with the least error at the outputs."""
    sums = torch.cat(of_value.sums).double()
    width = (of_value.high - of_value.low) / BINS
    centres = of_value.low + (torch.arange(BINS, dtype=torch.float64) + 0.5) * width

    def qparams(low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
        return qparams_of_range(observer, torch.tensor(low), torch.tensor(high))

    def cost(low: float, high: float) -> float:
        scale, zero_point = (float(q) for q in qparams(low, high))
        ends = (observer.quant_min - zero_point) * scale, (observer.quant_max - zero_point) * scale
        saturation = centres.clamp(*ends) - centres
        # The rounding error is scale/√12 on average; that of a value within half a step of zero is the value.
        rounding = torch.where(centres.abs() < scale / 2, centres.square().clamp(max=scale**2 / 12), scale**2 / 12)
        inside = saturation == 0
        return float((sums @ saturation).square().sum() + (of_value.squares * rounding)[inside].sum())

    best = of_value.low, of_value.high
    shrunk = _SHRINK.tolist()
    best = min(((best[0] * f, best[1] * f) for f in shrunk), key=lambda ends: cost(*ends))
    for _ in range(_ROUNDS):  # each end alone, in turn
        best = min(((of_value.low * f, best[1]) for f in shrunk), key=lambda ends: cost(*ends))
        best = min(((best[0], of_value.high * f) for f in shrunk), key=lambda ends: cost(*ends))
    return qparams(*best)
