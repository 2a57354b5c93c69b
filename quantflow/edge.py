"""The edge dialect, where delegation enters."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch.export import ExportedProgram

from quantflow import delegates, proof
from quantflow.core_aten import CoreAten, lower_to_core_aten
from quantflow.delegates.delegate import Delegate
from quantflow.delegates.delegation import Delegation
from quantflow.delegates.fast_lowering import run_fast
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.containers import with_plain_containers
from quantflow.graph.lifted import rewritten
from quantflow.inspection.pte import SIGNATURE_METHOD
from quantflow.program import Program
from quantflow.signature import Signature


@dataclass(frozen=True)
class Edge:
    """A program in executorch's edge dialect, partitioned to its delegates.

    Attributes:
        manager: The ``executorch.exir.EdgeProgramManager``.
        core: What it was lowered from.
        delegate: What it was lowered to.
        refused: Nodes kept out of the delegate because it would not load them.
    """

    manager: Any
    core: CoreAten
    delegate: Delegate
    refused: frozenset[str] = frozenset()

    @property
    def signature(self) -> Signature:
        """What the program takes and returns."""
        return self.core.signature

    def delegation(self) -> Delegation:
        """What the delegates run, and what is left outside."""
        return Delegation.of(self.manager.exported_program().graph_module)

    def to_executorch(self, config: Any = None, *, strict: bool = False) -> Program:
        """Plan memory, take out-variants, serialise, and run the program once on the runtime.

        It is compared with the graph on the example inputs that were exported with it. A node that the delegate refuses to
        load is named in a warning and left to portable kernels.

        Args:
            config: An ``executorch.exir.ExecutorchBackendConfig``, or None for its defaults.
            strict: Raise where otherwise there would be a warning.

        Raises:
            QuantflowError: at stage ``"executorch"``, where a dynamic dimension has no upper bound (it is named) or an
                operator has no kernel; at ``"runtime"``, where the program does not load or run, whatever is left out.
        """
        program = self._serialise(config)
        trial = Program(program.buffer, program.signature)  # what a run does to its state is not to be seen
        foreign = (
            type(self.delegate) is Delegate and self.delegate.partitioners()
        )  # its runtime may be on another machine
        try:
            trial.load()
        except QuantflowError as error:
            if foreign:
                return _unproven(program, error, strict)
            return self._without_refused(error, strict).to_executorch(config, strict=strict)
        try:
            difference = proof.disagreement(trial, self.core.source)
        except QuantflowError as error:
            if foreign:
                return _unproven(program, error, strict)
            portable = program.delegation.portable if program.delegation is not None else ()
            if not portable:
                raise
            remedy = (
                "one of these has no portable kernel for this form (a convolution over three dimensions): replace it"
            )
            raise QuantflowError("runtime", error.reason, node=", ".join(portable), remedy=remedy) from error
        if difference:
            remedy = "lower with to_edge(None): equal figures there mean that the delegate computes wrongly"
            _complain("runtime", difference, "the program", remedy, strict)
        outside = program.delegation.quantized_outside if program.delegation is not None else ()
        if outside and self.delegate.partitioners():
            remedy = "print(quantizer.plan(graph)); skip the layer, or give its input integers as well"
            _complain("edge", "quantized, but no delegate runs it", ", ".join(outside), remedy, strict)
        return program

    def _serialise(self, config: Any) -> Program:
        for declared, dim in self.signature.unbounded():
            raise QuantflowError(
                "executorch",
                f"dimension {dim.name} has no upper bound, and memory is planned ahead",
                node=declared.name,
                remedy="export with dynamic_batch=N, with Dim(..., max=N), or with static shapes",
            )
        import executorch.kernels.quantized  # noqa: F401  out-variants of the quantized operators

        delegation = self.delegation()  # what follows changes the graph
        try:
            manager = run_fast(lambda: self.manager.to_executorch(config))
        except Exception as error:
            raise QuantflowError(
                "executorch",
                f"{type(error).__name__}: {error}",
                remedy="an operator without an executorch kernel must go to a delegate or be rewritten",
            ) from error
        return Program(manager.buffer, self.signature, delegation)

    def _without_refused(self, error: QuantflowError, strict: bool) -> Edge:
        """This program, lowered again without the nodes that the delegate does not load.

        Raises:
            QuantflowError: ``error``, when no single node is to blame; that of the node, when ``strict``.
        """
        refused = frozenset(refused_nodes(self.core, self.delegate)) - self.refused
        if not refused:
            raise error
        remedy = "skip these layers in the quantizer, or let them run in portable kernels"
        _complain(
            "edge", f"the delegate refuses to load it: {error.reason}", ", ".join(sorted(refused)), remedy, strict
        )
        return lower_to_edge(self.core, self.delegate, refused | self.refused)

    def __repr__(self) -> str:
        return f"Edge({str(self.delegation()).splitlines()[0]}; inputs: {self.signature.describe_inputs()})"


def _unproven(program: Program, error: QuantflowError, strict: bool) -> Program:
    _complain("runtime", f"not proven: {error.reason}", "the program", error.remedy or "", strict)
    return program


def _complain(stage: str, reason: str, node: str, remedy: str, strict: bool) -> None:
    if strict:
        raise QuantflowError(stage, reason, node=node, remedy=remedy)
    warnings.warn(QuantflowWarning(stage, reason, node=node, remedy=remedy), stacklevel=4)


def lower_to_edge(core: CoreAten, delegate: Any, refused: frozenset[str] = frozenset()) -> Edge:
    """Lower ``core`` to the edge dialect and partition it for ``delegate``, but for the edge nodes named in ``refused``."""
    backend = delegates.resolve(delegate)
    return Edge(_manager(core, backend, backend.partitioners(refused)), core, backend, refused)


def straight_to_edge(program: ExportedProgram, delegate: Any) -> Edge:
    """As by way of core ATen, to the same bytes; core ATen itself, which delegates do not read, is left out.

    Raises:
        QuantflowError: as ``to_core_aten`` and ``to_edge`` do.
    """
    if delegates.resolve(delegate).partitioners():
        try:
            return lower_to_edge(CoreAten(program, program), delegate)
        except QuantflowError:  # core ATen may know better which operator is at fault
            pass
    return lower_to_core_aten(program).to_edge(delegate)


def refused_nodes(core: CoreAten, delegate: Delegate) -> list[str]:
    """The edge nodes that the delegate claims and then does not load, each tried in a program of its own."""
    partitioners = delegate.one_by_one()
    if not partitioners:
        return []
    graph = _manager(core, delegate, partitioners).exported_program().graph_module
    refused = []
    for lowered, nodes in delegates.lowered_modules(graph):
        try:
            Program(lowered.buffer(), Signature(())).load()
        except QuantflowError:
            refused += nodes
    return refused


def _manager(core: CoreAten, backend: Delegate, partitioners: list[Any]) -> Any:
    from executorch import exir

    source = with_plain_containers(rewritten(core.source, backend.rewrite))
    constant_methods = {SIGNATURE_METHOD: core.signature.to_json()}

    def lower() -> Any:
        if not partitioners:
            program = core.program if source is core.source else source.run_decompositions()
            return exir.to_edge(program, constant_methods=constant_methods)
        passes = backend.passes() or None
        return exir.to_edge_transform_and_lower(
            source, transform_passes=passes, partitioner=partitioners, constant_methods=constant_methods
        )

    try:
        return run_fast(lower)
    except Exception as error:
        raise QuantflowError(
            "edge",
            f"{type(error).__name__}: {error}",
            remedy="to_edge(None) tells whether the delegate is the cause",
        ) from error
