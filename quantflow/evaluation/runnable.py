"""Anything that a stage gave, of this project or of another tool, as something to run and to measure."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule

from quantflow import pte
from quantflow.capture.export import export
from quantflow.capture.exported import Exported
from quantflow.conversion.convert import check_observed
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.evaluation.batch_slices import in_rows
from quantflow.graph.aten import label
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.graph.inference_mode import inference_mode
from quantflow.graph.modes import training_literals
from quantflow.graph.own_state import state_kept
from quantflow.graph.regions import nodes_of
from quantflow.graph.state import writes_inputs
from quantflow.inspection import inspect as inspection
from quantflow.lowering.core_aten import CoreAten
from quantflow.lowering.program import Program
from quantflow.observers.fake_quantize import FakeQuantize
from quantflow.observers.observation import is_converted, is_fake_quantizer, observer_of, observers_of
from quantflow.signature.signature import Input, Signature
from quantflow.simulation.interpreter import Simulation, has_grid

FLOAT, OBSERVED, FAKE_QUANTIZED, CONVERTED, PTE = "float", "observed", "fake-quantized", "converted", ".pte"


@dataclass(frozen=True)
class Stage:
    """One stage, to run.

    Attributes:
        name: What it is called in the results.
        kind: ``"float"``, ``"observed"``, ``"fake-quantized"``, ``"converted"`` (these three simulate integers in PyTorch)
            or ``".pte"``, which runs on the ExecuTorch runtime.
        run: Takes positional and keyword inputs, returns the model's own structure.
        signature: What it takes; None for an eager model, which tells only names.
        bytes: Size of the file, or of parameters and buffers; None for a prepared graph, which is nothing to ship.
        contents: What the file holds, for a ``.pte``.
        module: What runs, where that is a module.
    """

    name: str
    kind: str
    run: Callable[[tuple, dict[str, Any]], Any]
    signature: Signature | None
    bytes: int | None
    contents: pte.Contents | None = None
    module: nn.Module | None = None

    @classmethod
    def of(cls, name: str, subject: Any) -> Stage:
        """The stage that ``subject`` is.

        Args:
            name: What to call it.
            subject: An ``nn.Module`` (eager, captured, prepared or converted), an ``Exported``, a ``CoreAten``, a
                ``torch.export.ExportedProgram``, a ``Program``, or the path of a ``.pte``.

        Raises:
            QuantflowError: at stage ``"verify"``, for something else and for a graph in training mode; at ``"calibrate"``
                for a prepared graph that saw no data; at ``"runtime"`` for a file that is no program or that the runtime
                does not take, which is tried in a process of its own.
        """
        if isinstance(subject, (str, os.PathLike)):
            return cls._of_program(name, examined(subject))
        if isinstance(subject, Program):
            return cls._of_program(name, subject)
        if isinstance(subject, ExportedProgram):
            subject = export(subject)
        if isinstance(subject, (Exported, CoreAten)):
            subject = subject.module() if isinstance(subject, CoreAten) else subject.module().eval()
        if isinstance(subject, GraphModule):
            return cls._of_graph(name, subject)
        if isinstance(subject, nn.Module):
            return cls(name, FLOAT, lambda a, k: subject(*a, **k), None, _state_bytes(subject), module=subject)
        remedy = "a module, Exported, ExportedProgram, Program or the path of a .pte"
        raise QuantflowError("verify", f"{type(subject).__name__} is no stage", node=name, remedy=remedy)

    @classmethod
    def _of_program(cls, name: str, program: Program) -> Stage:
        program = dataclasses.replace(program)  # one of its own, whose state begins anew
        program.load()

        def run(args: tuple, kwargs: dict[str, Any]) -> Any:
            if program.signature.in_spec is None:  # only its flat inputs are known
                return program(*pytree.tree_leaves((args, kwargs)))
            return program(*args, **kwargs)

        return cls(name, PTE, run, program.signature, len(program.buffer), pte.read(program.buffer))

    @classmethod
    def _of_graph(cls, name: str, graph: GraphModule) -> Stage:
        signature, observers = Signature.of_graph(graph), observers_of(graph).values()
        training = [] if isinstance(graph, TrainableGraphModule) else training_literals(nodes_of(graph))
        if training:
            reason = f"the graph stands in training mode: {label(training[0])}"
            remedy = "torchao.quantization.pt2e.move_exported_model_to_eval(graph)"
            raise QuantflowError("verify", reason, node=name, remedy=remedy)
        if not observers:
            kind = CONVERTED if is_converted(graph) else FLOAT
            return cls(name, kind, lambda a, k: graph(*a, **k), signature, _state_bytes(graph), module=graph)
        check_observed(graph)
        kind = FAKE_QUANTIZED if all(is_fake_quantizer(o) for o in observers) else OBSERVED
        if all(isinstance(o, FakeQuantize) for o in observers):  # in inference mode they round, and learn nothing
            return cls(name, kind, lambda a, k: graph(*a, **k), signature, None, module=graph)
        _warn_of_what_stays_float(name, graph)
        simulation: list[Simulation] = []  # made at the first call, when the graph is in inference mode

        def run(args: tuple, kwargs: dict[str, Any]) -> Any:
            if not simulation:
                simulation.append(Simulation(graph))
            return signature.unflatten(simulation[0](*signature.flatten(args, kwargs, stage="verify")))

        return cls(name, kind, run, signature, None, module=graph)

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run it on any number of rows, without gradients, on the device where it lives.

        Raises:
            QuantflowError: as the stage does; anything else that it raises, at stage ``"verify"``.
        """
        device = self._device()
        if device is not None:
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (args, kwargs))
        try:
            with torch.no_grad():
                if self._may_write_inputs():
                    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
                return in_rows(self.run, self.signature, args, kwargs)
        except QuantflowError as error:
            where = self.name + (f", {error.node}" if error.node else "")
            raise QuantflowError(error.stage, error.reason, node=where, remedy=error.remedy) from error
        except Exception as error:
            reason = f"does not run on the data: {type(error).__name__}: {str(error)[:400]}"
            raise QuantflowError("verify", reason, node=self.name, remedy="check the inputs it was made for") from error

    @contextmanager
    def mode(self) -> Iterator[None]:
        """Inference mode for a while; state that the calls in between write is given back as it was."""
        if self.module is None:
            yield
            return
        with inference_mode(self.module), state_kept(self.module):
            yield

    def names(self) -> tuple[list[str], list[str]]:
        """For an eager model, the names of its inputs: those that it must have, and all."""
        parameters = inspect.signature(self.module.forward).parameters.values() if self.module is not None else ()
        named = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        return [p.name for p in named if p.default is p.empty], [p.name for p in named]

    def _may_write_inputs(self) -> bool:
        if isinstance(self.module, GraphModule):
            return writes_inputs(self.module)
        return self.module is not None or (self.signature is not None and bool(self.signature.written))

    def _device(self) -> torch.device | None:
        tensors = () if self.module is None else itertools.chain(self.module.parameters(), self.module.buffers())
        return next((t.device for t in tensors), None)


def examined(path: str | os.PathLike[str]) -> Program:
    """The program in the file ``path``, which may come from anyone, once it ran on zeros in a process of its own.

    Raises:
        QuantflowError: at stage ``"runtime"``, when it is no whole program, or the runtime does not take it.
    """
    buffer = inspection.file_bytes(path)  # once: the file may be another one by the time that it was examined
    found = inspection.inspect_bytes(buffer, str(path))
    if found.refused:
        method, why = next(iter(found.refused.items()))
        remedy = "`quantflow inspect` says what it holds; `quantflow doctor` what this runtime has"
        raise QuantflowError("runtime", f"{method} does not run: {why}", node=str(path), remedy=remedy)
    if "forward" in found.not_run:
        reason = f"forward was loaded, not run: {found.not_run['forward']}"
        warnings.warn(
            QuantflowWarning("runtime", reason, node=str(path), remedy="run it only if you trust it"), stacklevel=2
        )
    try:
        return Program.from_buffer(buffer)
    except QuantflowError as error:
        raise QuantflowError(error.stage, error.reason, node=str(path), remedy=error.remedy) from error


def _warn_of_what_stays_float(name: str, graph: GraphModule) -> None:
    for node in graph.graph.nodes:
        observer = observer_of(node, graph)
        if observer is not None and not has_grid(observer) and not getattr(observer, "is_dynamic", False):
            reason = f"{type(observer).__name__} has no grid that can be simulated: it is float here"
            remedy = "verify the converted graph as well"
            warnings.warn(QuantflowWarning("verify", reason, node=f"{name}, {node.name}", remedy=remedy), stacklevel=5)


def _state_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in itertools.chain(module.parameters(), module.buffers()))


def flat_signature(names: list[str]) -> Signature:
    """The signature of a model of which only the names of its inputs are known."""
    return Signature(tuple(Input(name) for name in names))
