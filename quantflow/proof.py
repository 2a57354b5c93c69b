"""Proof on the runtime: a program loads, runs, and says what its graph says."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram

from quantflow.metrics import signal_to_noise
from quantflow.observers.observation import is_converted
from quantflow.program import Program

# Below this, dB, a program computes something else than its graph. In integers a rounding that falls the other way grows from
# layer to layer, so deep networks with random weights agree to 15 dB only; in float nothing but the order of sums differs.
_ROUNDING = 1e-5
_LEAST_SQNR = {True: 8.0, False: 40.0}


def disagreement(program: Program, source: ExportedProgram) -> str:
    """Run ``program`` on the example inputs of ``source`` and compare; says how they differ, ``""`` where they agree, and where
    there is nothing to run it on.

    Raises:
        QuantflowError: at stage ``"runtime"``, when the program does not load or run.
    """
    if source.example_inputs is None:
        return ""
    (args, kwargs), (same, also) = (copy.deepcopy(source.example_inputs) for _ in range(2))  # either may write to them
    found = _floats(program(*args, **kwargs))
    with torch.no_grad():
        graph = copy.deepcopy(source.module(check_guards=False))
        expected = _floats(graph(*same, **also))
    least = _LEAST_SQNR[is_converted(graph)]  # type: ignore[arg-type]
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if ours.shape != theirs.shape:
            return f"output {index} has shape {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        if torch.allclose(ours, theirs, rtol=0.0, atol=_ROUNDING, equal_nan=True):
            continue  # where a network cancels to nothing, what is left is rounding
        sqnr = signal_to_noise(theirs, ours)
        if not sqnr >= least:
            return f"output {index} agrees with the graph to {sqnr:.1f} dB only"
    return ""


def _floats(output: Any) -> list[torch.Tensor]:
    return [
        t.detach().cpu() for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor) and t.is_floating_point()
    ]
