"""The check of a program on the runtime: it loads, runs, and computes what its graph computes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.export import ExportedProgram

from quantflow.graph.state import is_written
from quantflow.lowering.program import Program
from quantflow.lowering.tied_order import return_rows
from quantflow.metrics import signal_to_noise, squares
from quantflow.observers.observation import is_converted
from quantflow.runtime import isolated
from quantflow.signature.signature import Signature

# Where a network cancels to nothing, what is left is rounding.
_ROUNDING = 1e-5
# The signal to noise ratio, dB, below which a program is suspected. In float nothing but the order of sums differs; in integers
# a rounding that falls the other way grows from layer to layer.
_SUSPECT_FLOAT, _SUSPECT_INTEGERS = 40.0, 30.0
# How far inputs are moved to see what rounding does, as a share of their largest value.
_FLOAT_STEP, _INTEGER_STEP = 1e-6, 0.5 / 128
_MARGIN = 10.0  # times what such a move does, in squares
_DRAWS = 4  # of such moves
_STATEFUL_CALLS = 3


@dataclass(frozen=True)
class Finding:
    """What is wrong with a program.

    Attributes:
        reason: In words.
        loaded: Whether it loaded.
        ran: Whether it ran, so that it is its results that are wrong.
        operators: Operators whose kernels are missing or failed.
    """

    reason: str
    loaded: bool = True
    ran: bool = True
    operators: tuple[str, ...] = ()


def load(program: Program) -> Finding | None:
    """Load ``program`` in a process of its own; what is wrong with it, None for nothing."""
    trial = isolated.run(program.buffer)
    return Finding(trial.failure, trial.loaded, False, trial.operators) if trial.failure else None


def check(program: Program, source: ExportedProgram) -> Finding | None:
    """Run ``program`` in a process of its own beside the graph ``source`` that it was lowered from.

    It is called on the example inputs and on others of the same shapes, three times in a row where it keeps state. Outputs of
    any dtype are compared. A network that amplifies rounding is recognised by moving the inputs of its graph by one step.

    Returns:
        What is wrong, None for nothing. Without example inputs the program is only loaded.
    """
    if source.example_inputs is None:
        return load(program)
    reference = _Reference(source, program.signature)
    calls = [program.signature.leaves(*inputs, stage="runtime") for inputs in reference.inputs]
    trial = isolated.run(program.buffer, calls)
    if trial.failure:
        return Finding(trial.failure, trial.loaded, False, trial.operators)
    for call, (found, expected) in enumerate(zip(trial.outputs, reference.outputs, strict=True)):
        if len(found) != len(expected):
            return Finding(f"it returns {len(found)} values, the graph {len(expected)}")
        for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
            if reason := _difference(ours, theirs, reference, call, index):
                return Finding(f"output {index} {reason}" + (f", at call {call + 1}" if call else ""))
    return None


class _Reference:
    """The graph that a program was lowered from.

    Attributes:
        inputs: The positional and keyword inputs of each call, in a row.
        outputs: What each returns, flat: the inputs that it writes, then the outputs.
    """

    def __init__(self, source: ExportedProgram, signature: Signature) -> None:
        self.graph, self.signature = source.module(check_guards=False), signature
        self.in_integers = is_converted(self.graph)
        example, repeats = source.example_inputs, _STATEFUL_CALLS if _keeps_state(source) else 1
        first = pytree.tree_map(_filled, example)
        try:
            self.inputs = [first, pytree.tree_map(_other, first), *[first] * (repeats - 2)]
            self.outputs = self._run(copy.deepcopy(self.graph), _copied(self.inputs))
        except Exception:  # values that the network does not take
            self.inputs = [example] * repeats
            self.outputs = self._run(copy.deepcopy(self.graph), _copied(self.inputs))

    def moved(self) -> Iterator[list[list[Any]]]:
        """The outputs with the inputs moved by a step, or the parameters where no input is of floats."""
        for seed in range(_DRAWS):
            move = _Move(_INTEGER_STEP if self.in_integers else _FLOAT_STEP, seed)
            graph, inputs = copy.deepcopy(self.graph), pytree.tree_map(move, _copied(self.inputs))
            if not move.moved:
                with torch.no_grad():
                    for parameter in graph.parameters():
                        parameter.copy_(move(parameter))
            yield self._run(graph, inputs)

    def ordered(self, call: int, index: int, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        """Whether two outputs are indices that order values, and differ in the order of equal ones only."""
        graph, written = copy.deepcopy(self.graph), len(self.signature.written)
        ordering = return_rows(graph, index - written) if index >= written else None
        if ordering is None:
            return False
        rows = self._run(graph, _copied(self.inputs))[call][index]
        found, expected = (ordering.pointed_at(call, rows, output.to(rows.device)) for output in (ours, theirs))
        if found is None or expected is None or found[1] != expected[1]:
            return False
        (our_values, _), (their_values, _) = found, expected
        if not their_values.is_floating_point() or not their_values.numel():
            return torch.equal(our_values, their_values)
        if self.in_integers:
            return signal_to_noise(their_values, our_values) >= _SUSPECT_INTEGERS
        finite = their_values[their_values.isfinite()].abs()
        largest = max(1.0, float(finite.max())) if finite.numel() else 1.0
        return torch.allclose(our_values, their_values, 0.0, _ROUNDING * largest, equal_nan=True)

    def _run(self, graph: Any, inputs: Any) -> list[list[Any]]:
        found = []
        with torch.no_grad():
            for args, kwargs in inputs:
                outputs = pytree.tree_leaves(graph(*args, **kwargs))
                flat = self.signature.leaves(args, kwargs, stage="runtime")
                # A result may be a view of state that the next call writes to.
                found.append(_copied([*(flat[place] for place in self.signature.written), *outputs]))
        return found


def _copied(values: Any) -> Any:
    """``values``, in any structure, with copies of their tensors, which know nothing of gradients."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), values)


def _keeps_state(source: ExportedProgram) -> bool:
    """Whether ``source`` writes buffers, with in-place operators or as further outputs."""
    signature = source.graph_signature
    reads = (n for n in source.graph.find_nodes(op="placeholder") if n.name in signature.inputs_to_buffers)
    return bool(signature.buffers_to_mutate) or any(map(is_written, reads))


class _Move:
    """Moves tensors of floats by up to ``step`` of their largest value, either way."""

    def __init__(self, step: float, seed: int) -> None:
        self.step, self.random, self.moved = step, torch.Generator().manual_seed(seed), 0

    def __call__(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or not leaf.numel():
            return leaf
        self.moved += 1
        offset = torch.rand(leaf.shape, generator=self.random).to(leaf) * 2 - 1
        return leaf + offset * self.step * leaf.abs().max()


def _filled(leaf: Any) -> Any:
    """``leaf``, or random numbers from 0 to 1 where it holds zeros alone: they tell a shape, and no rounding moves them."""
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or leaf.any():
        return leaf
    return torch.rand(leaf.shape, generator=torch.Generator().manual_seed(1)).to(leaf)


def _other(leaf: Any) -> Any:
    """Another tensor of the shape, dtype and range of ``leaf``; what is no tensor stays."""
    if not isinstance(leaf, torch.Tensor) or not leaf.numel():
        return leaf
    backwards = leaf.flip(tuple(range(leaf.ndim)))
    if not leaf.is_floating_point():
        return backwards
    factors = torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0)).to(leaf)
    return backwards * (0.5 + factors / 2)


def _difference(ours: Any, theirs: Any, reference: _Reference, call: int, index: int) -> str:
    """How an output differs from the graph's by more than rounding explains; ``""`` where it does not."""
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return "" if type(ours) is not type(theirs) or ours == theirs else f"is {ours}, not {theirs}"
    theirs = theirs.cpu()
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return f"is {ours.dtype} {tuple(ours.shape)}, not {theirs.dtype} {tuple(theirs.shape)}"
    floating = theirs.is_floating_point()
    if torch.equal(ours, theirs) or (floating and torch.allclose(ours, theirs, 0.0, _ROUNDING, equal_nan=True)):
        return ""
    sqnr = signal_to_noise(theirs, ours)
    if floating and sqnr >= (_SUSPECT_INTEGERS if reference.in_integers else _SUSPECT_FLOAT):
        return ""
    if reference.ordered(call, index, ours, theirs):
        return ""
    allowed = (_MARGIN * _noise(theirs, moved[call][index].cpu()) for moved in reference.moved())
    if any(_noise(theirs, ours) <= noise for noise in allowed):
        return ""
    if floating:
        return f"agrees with the graph to {sqnr:.1f} dB only"
    return f"differs from the graph in {int((ours != theirs).sum())} of {theirs.numel()} elements"


def _noise(reference: torch.Tensor, output: torch.Tensor) -> float:
    return squares(reference, output)[1]
