"""A common interface to run and measure stages: modules, graphs, exported programs and ``.pte`` files, of any tool."""

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
from quantflow.simulation.fake_quantized import is_affine
from quantflow.simulation.network import Simulation
from quantflow.upstream import pytree

FLOAT, OBSERVED, FAKE_QUANTIZED, CONVERTED, PTE = "float", "observed", "fake-quantized", "converted", ".pte"


@dataclass(frozen=True)
class Stage:
    """One stage that can be run.

    Attributes:
        name: Its name in the results.
        kind: ``"float"``, ``"observed"``, ``"fake-quantized"``, ``"converted"`` (these three simulate integers in PyTorch)
            or ``".pte"``, which runs on the ExecuTorch runtime.
        run: A function of positional and keyword inputs that returns outputs in the model's own structure.
        signature: The inputs; None for an eager model, of which only the names are known.
        bytes: Size of the file, or of parameters and buffers; None for a prepared graph, which is not deployed.
        contents: The contents of a ``.pte`` file.
        module: The module that runs, if the stage is one.
        reset: Lets the next call of ``run`` begin in the first state; None where the state is that of ``module``.
    """

    name: str
    kind: str
    run: Callable[[tuple, dict[str, Any]], Any]
    signature: Signature | None
    bytes: int | None
    contents: pte.Contents | None = None
    module: nn.Module | None = None
    reset: Callable[[], None] | None = None

    @classmethod
    def of(cls, name: str, subject: object) -> Stage:
        """The stage of ``subject``.

        Args:
            name: Its name in results and errors.
            subject: An ``nn.Module`` (eager, captured, prepared or converted), an ``Exported``, a ``CoreAten``, a
                ``torch.export.ExportedProgram``, a ``Program``, or the path of a ``.pte``.

        Raises:
            QuantflowError: at stage ``"verify"``, for another type and for a graph in training mode; at ``"calibrate"``
                for a prepared graph without calibration; at ``"runtime"`` for a file that is not a program or that the runtime
                rejects, which a separate process tries first.
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
        program = dataclasses.replace(program)  # a copy, whose state starts from the beginning
        program.load()

        def run(args: tuple, kwargs: dict[str, Any]) -> Any:
            if program.signature.in_spec is None:  # only the flat inputs are known
                return program(*pytree.tree_leaves((args, kwargs)))
            return program(*args, **kwargs)

        contents = pte.read(program.buffer)
        return cls(name, PTE, run, program.signature, len(program.buffer), contents, reset=program.reset)

    @classmethod
    def _of_graph(cls, name: str, graph: GraphModule) -> Stage:
        signature, observers = Signature.of_graph(graph), observers_of(graph).values()
        training = [] if isinstance(graph, TrainableGraphModule) else training_literals(nodes_of(graph))
        if training:
            reason = f"the graph is in training mode: {label(training[0])}"
            remedy = "torchao.quantization.pt2e.move_exported_model_to_eval(graph)"
            raise QuantflowError("verify", reason, node=name, remedy=remedy)
        if not observers:
            kind = CONVERTED if is_converted(graph) else FLOAT
            return cls(name, kind, lambda a, k: graph(*a, **k), signature, _state_bytes(graph), module=graph)
        check_observed(graph)
        kind = FAKE_QUANTIZED if all(is_fake_quantizer(o) for o in observers) else OBSERVED
        if all(isinstance(o, FakeQuantize) for o in observers):  # in inference mode they round without observing
            return cls(name, kind, lambda a, k: graph(*a, **k), signature, None, module=graph)
        _warn_of_what_stays_float(name, graph)
        simulation: list[Simulation] = []  # constructed at the first call, when the graph is in inference mode

        def run(args: tuple, kwargs: dict[str, Any]) -> Any:
            if not simulation:
                simulation.append(Simulation(graph))
            return signature.unflatten(simulation[0](*signature.flatten(args, kwargs, stage="verify")))

        return cls(name, kind, run, signature, None, module=graph, reset=simulation.clear)

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Run the stage on any number of rows, without gradients, on its device.

        Raises:
            QuantflowError: that of the stage; any other exception as an error at stage ``"verify"``.
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
        """A context of inference mode, at whose end the state that calls have written is restored."""
        if self.module is None:
            yield
            return
        with inference_mode(self.module), state_kept(self.module):
            yield

    def names(self) -> tuple[list[str], list[str]]:
        """For an eager model, the names of its required inputs and of all inputs."""
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
    """Read the program in a file from any source, after a separate process ran it on zeros.

    A warning says where no inputs could be made to run it.

    Args:
        path: The file.

    Returns:
        The program.

    Raises:
        QuantflowError: at stage ``"runtime"``, when the file is no whole program, or the runtime does not load or run it.

    Example:
        >>> import os, tempfile, torch
        >>> import quantflow as qf
        >>> from quantflow.evaluation import examined
        >>> edge = qf.export(torch.nn.Linear(8, 4).eval(), (torch.randn(1, 8),)).to_core_aten().to_edge()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = edge.to_executorch().save(os.path.join(folder, "model.pte"))
        ...     print(examined(path).methods)
        ('forward',)
    """
    buffer = inspection.file_bytes(path)  # read once: the file could be replaced after the examination
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
        if observer is not None and not is_affine(observer) and not getattr(observer, "is_dynamic", False):
            reason = f"{type(observer).__name__} has no scale and zero point to simulate: it is float here"
            remedy = "verify the converted graph as well"
            warnings.warn(QuantflowWarning("verify", reason, node=f"{name}, {node.name}", remedy=remedy), stacklevel=5)


def _state_bytes(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in itertools.chain(module.parameters(), module.buffers()))


def flat_signature(names: list[str]) -> Signature:
    """The signature of a model that only has the names of its inputs."""
    return Signature(tuple(Input(name) for name in names))
