"""A check that a program loads and runs on the runtime and gives the results of its graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from quantflow.graph.state import is_written
from quantflow.lowering.program import Program
from quantflow.lowering.tied_order import return_rows
from quantflow.metrics import signal_to_noise, squares
from quantflow.observers.observation import is_converted
from quantflow.runtime import isolated
from quantflow.signature.signature import DynamicDim, Signature
from quantflow.upstream import pytree

# The absolute tolerance, for networks whose output cancels to zero up to rounding.
_ROUNDING = 1e-5
# The signal to noise ratio, dB, below which a program is suspected. In float only the order of sums differs. In integers, a
# different rounding grows from layer to layer.
_SUSPECT_FLOAT, _SUSPECT_INTEGERS = 40.0, 30.0
# The perturbation of inputs that measures the effect of rounding, as a fraction of their largest value.
_FLOAT_STEP, _INTEGER_STEP = 1e-6, 0.5 / 128
_MARGIN = 10.0  # the allowed ratio of squared errors to those of a perturbation
_DRAWS = 4  # the number of perturbations
_STATEFUL_CALLS = 3
_LARGEST = 16  # the greatest size in which a program is called, in elements of the example inputs


@dataclass(frozen=True)
class Finding:
    """The fault of a program.

    Attributes:
        reason: A description of the fault.
        loaded: Whether the program loaded.
        ran: Whether the program ran, so that its results are wrong.
        operators: Operators whose kernels are missing or failed.
    """

    reason: str
    loaded: bool = True
    ran: bool = True
    operators: tuple[str, ...] = ()


def load(program: Program) -> Finding | None:
    """Load ``program`` in a separate process and return its fault, or None."""
    trial = isolated.run(program.buffer)
    return Finding(trial.failure, trial.loaded, False, trial.operators) if trial.failure else None


def check(program: Program, source: ExportedProgram) -> Finding | None:
    """Compare ``program``, run in a separate process, with the graph ``source`` that it was lowered from.

    The program is called on the example inputs and on other inputs of the same shapes, three times in sequence if it has state;
    without state also in the least and the greatest size if its shapes vary.
    Outputs of any dtype are compared. A network that amplifies rounding is recognised by a perturbation of the graph's inputs.

    Returns:
        The fault, or None. Without example inputs the program is only loaded.
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
        inputs: The positional and keyword inputs of each call, in sequence.
        outputs: The flat results of each call: the inputs that it writes, then the outputs.
    """

    def __init__(self, source: ExportedProgram, signature: Signature) -> None:
        self.graph, self.signature = source.module(check_guards=False), signature
        self.in_integers = is_converted(self.graph)
        stateful, example = _keeps_state(source), source.example_inputs
        assert example is not None
        repeats = _STATEFUL_CALLS if stateful else 1
        first = pytree.tree_map(_filled, example)
        try:
            self.inputs = [first, pytree.tree_map(_other, first), *[first] * (repeats - 2)]
            self.outputs = self._run(copy.deepcopy(self.graph), _copied(self.inputs))
        except Exception:  # the network does not accept the values
            self.inputs = [example] * repeats
            self.outputs = self._run(copy.deepcopy(self.graph), _copied(self.inputs))
        for sized in () if stateful else self._of_other_sizes(example):
            try:
                self.outputs += self._run(copy.deepcopy(self.graph), _copied([sized]))
            except Exception:  # sizes within the bounds of each dimension that do not go together
                continue
            self.inputs.append(sized)

    def _of_other_sizes(self, example: tuple) -> list[Any]:
        """The example inputs in the least and in the greatest sizes, if these differ and are not too large."""
        flat = self.signature.leaves(*example, stage="runtime")
        found: list[Any] = []
        if self.signature.in_spec is None:
            return found
        for end in ("min", "max"):
            sized = [_resized(leaf, i.shape, end) for leaf, i in zip(flat, self.signature.inputs, strict=True)]
            elements, example_elements = (
                sum(leaf.numel() for leaf in leaves if isinstance(leaf, torch.Tensor)) for leaves in (sized, flat)
            )
            if any(a is not b for a, b in zip(sized, flat, strict=True)) and elements <= _LARGEST * example_elements:
                found.append(pytree.tree_unflatten(sized, self.signature.in_spec))
        return found

    def moved(self) -> Iterator[list[list[Any]]]:
        """Yield the outputs with perturbed inputs, or with perturbed parameters if no input is floating point."""
        for seed in range(_DRAWS):
            move = _Move(_INTEGER_STEP if self.in_integers else _FLOAT_STEP, seed)
            graph, inputs = copy.deepcopy(self.graph), pytree.tree_map(move, _copied(self.inputs))
            if not move.moved:
                with torch.no_grad():
                    for parameter in graph.parameters():
                        parameter.copy_(move(parameter))
            yield self._run(graph, inputs)

    def ordered(self, call: int, index: int, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
        """Whether two outputs are indices from a sort or similar, and differ only in the order of equal values."""
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

    def _run(self, graph: GraphModule, inputs: Any) -> list[list[Any]]:
        found = []
        with torch.no_grad():
            for args, kwargs in inputs:
                outputs = pytree.tree_leaves(graph(*args, **kwargs))
                flat = self.signature.leaves(args, kwargs, stage="runtime")
                # A result may be a view of state that the next call writes to.
                found.append(_copied([*(flat[place] for place in self.signature.written), *outputs]))
        return found


def _copied(values: Any) -> Any:
    """``values``, in any structure, with detached copies of their tensors."""
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().clone(), values)


def _keeps_state(source: ExportedProgram) -> bool:
    """Whether ``source`` writes buffers, by in-place operators or as additional outputs."""
    signature = source.graph_signature
    reads = (n for n in source.graph.find_nodes(op="placeholder") if n.name in signature.inputs_to_buffers)
    return bool(signature.buffers_to_mutate) or any(map(is_written, reads))


class _Move:
    """Perturbs floating point tensors by up to ``step`` times their largest value, in both directions."""

    def __init__(self, step: float, seed: int) -> None:
        self.step, self.random, self.moved = step, torch.Generator().manual_seed(seed), 0

    def __call__(self, leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or not leaf.numel():
            return leaf
        self.moved += 1
        offset = torch.rand(leaf.shape, generator=self.random).to(leaf) * 2 - 1
        return leaf + offset * self.step * leaf.abs().max()


def _filled(leaf: Any) -> Any:
    """``leaf``, or random numbers from 0 to 1 if it is all zeros, which only give a shape and hide rounding."""
    if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point() or leaf.any():
        return leaf
    return torch.rand(leaf.shape, generator=torch.Generator().manual_seed(1)).to(leaf)


def _resized(leaf: Any, shape: tuple[int | DynamicDim, ...], end: str) -> Any:
    """``leaf`` with its varying dimensions in the least or the greatest size, cut off or repeated; itself if none changes."""
    if not isinstance(leaf, torch.Tensor) or 0 in leaf.shape:
        return leaf
    for place, dim in enumerate(shape):
        if isinstance(dim, DynamicDim):
            size = max(dim.min, 1) if end == "min" else dim.max or leaf.shape[place]
            if size != leaf.shape[place]:
                leaf = leaf.index_select(place, torch.arange(size, device=leaf.device) % leaf.shape[place])
    return leaf


def _other(leaf: Any) -> Any:
    """Another tensor with the shape, dtype and range of ``leaf``; ``leaf`` itself if it is no tensor."""
    if not isinstance(leaf, torch.Tensor) or not leaf.numel():
        return leaf
    backwards = leaf.flip(tuple(range(leaf.ndim)))
    if not leaf.is_floating_point():
        return backwards
    factors = torch.rand(leaf.shape, generator=torch.Generator().manual_seed(0)).to(leaf)
    return backwards * (0.5 + factors / 2)


def _difference(ours: object, theirs: object, reference: _Reference, call: int, index: int) -> str:
    """How an output differs from the graph's by more than rounding; ``""`` if it does not."""
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
