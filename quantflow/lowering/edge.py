"""The stage of the edge dialect, in which a program is partitioned to its delegates."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.export import ExportedProgram

from quantflow import delegates
from quantflow.delegates import DelegateLike, lowered_modules
from quantflow.delegates.delegate import Delegate
from quantflow.delegates.delegation import Delegation
from quantflow.delegates.initial_state import lowering_state
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.aten import label, op
from quantflow.graph.rewrites import CENTERED_NORM_REWRITES
from quantflow.lowering import runtime_check
from quantflow.lowering.edge_manager import compiled_edge_manager, edge_manager
from quantflow.lowering.fault_search import SECONDS, FaultSearch
from quantflow.lowering.program import Program
from quantflow.lowering.runtime_check import Finding
from quantflow.runtime import isolated
from quantflow.signature.signature import Signature
from quantflow.upstream.lowering.fast_lowering import run_fast
from quantflow.upstream.operators import schema_of

if TYPE_CHECKING:
    from executorch.exir.capture import ExecutorchBackendConfig
    from executorch.exir.program import EdgeProgramManager

_REMEDY_FOREIGN = "run the program on a machine with its backend, which this runtime may not have"


@dataclass(frozen=True)
class Edge:
    """A program in executorch's edge dialect, partitioned to its delegates.

    Attributes:
        manager: The ``executorch.exir.EdgeProgramManager``.
        program: The ``ExportedProgram`` that was lowered, in core ATen if it passed through that stage.
        source: The pre-dispatch program, which is lowered if there is a delegate.
        delegate: The delegate.
        refused: Nodes left out of the delegate because it does not run them correctly.
    """

    manager: EdgeProgramManager
    program: ExportedProgram
    source: ExportedProgram
    delegate: Delegate
    refused: frozenset[str] = frozenset()

    @property
    def signature(self) -> Signature:
        """The inputs and outputs of the program."""
        return Signature.of_program(self.program)

    def delegation(self) -> Delegation:
        """Count the operators inside and outside the delegates."""
        return Delegation.of(self.manager.exported_program().graph_module)

    def to_executorch(
        self, config: ExecutorchBackendConfig | None = None, *, strict: bool = False, check: bool = True
    ) -> Program:
        """Plan memory, select out-variants, serialize, and verify the program on the runtime in a separate process.

        The program is compared with the graph on the exported example inputs and on other inputs of the same shapes. An
        operator that the delegate refuses to load or computes wrongly is named in a warning and left to portable kernels.

        Args:
            config: An ``executorch.exir.ExecutorchBackendConfig``, or None for its defaults.
            strict: Raise an error in place of each warning.
            check: False skips the comparison. The program is then only loaded.

        Raises:
            QuantflowError: at stage ``"executorch"``, if a dynamic dimension has no upper bound (it is named) or an
                operator has no kernel; at ``"runtime"``, if the program does not load or run or differs from the graph,
                whichever operators are left out of the delegate.
        """
        edge, program = self._proven(config, strict, check)
        outside = program.delegation.quantized_outside if program.delegation is not None else ()
        if outside and edge.delegate.partitioners():
            remedy = "print(quantizer.plan(graph)); skip the layer, or quantize its input as well"
            _warn("edge", "quantized, but no delegate runs it", ", ".join(outside), remedy, strict, depth=3)
        return program

    def _proven(self, config: ExecutorchBackendConfig | None, strict: bool, check: bool) -> tuple[Edge, Program]:
        """The verified program, and the edge program of it, without the operators that the delegate does not run correctly."""
        edge, search = self, FaultSearch()
        while True:
            program = edge._serialise(config)
            finding = runtime_check.check(program, edge.source) if check else runtime_check.load(program)
            if finding is None:
                return edge, program
            # The runtime for a foreign partitioner may be on another machine.
            if type(edge.delegate) is Delegate and edge.delegate.partitioners():
                _warn("runtime", f"not proven: {finding.reason}", "the program", _REMEDY_FOREIGN, strict)
                return edge, program
            faulty = edge._faults(finding, config, search) - edge.refused
            if not faulty:
                if finding.ran and (centered := edge._with_centered_norms(finding, config, strict)) is not None:
                    return centered
                raise _unmended(finding, program, edge.program, search.over)
            names = ", ".join(sorted(search.names[name] for name in faulty))
            does = "computes it wrongly" if finding.ran else "refuses to run it"
            remedy = "skip these layers in the quantizer, or let them run in portable kernels"
            _warn("edge", f"the delegate {does}: {finding.reason}", names, remedy, strict)
            edge = lower_to_edge(edge.program, edge.source, edge.delegate, frozenset(faulty) | edge.refused)

    def _with_centered_norms(
        self, finding: Finding, config: ExecutorchBackendConfig | None, strict: bool
    ) -> tuple[Edge, Program] | None:
        """The program with the mean subtracted before each norm, and its edge program, if that cures the ``finding``."""
        norms = [label(node) for node in self.source.graph.nodes if op(node) in CENTERED_NORM_REWRITES]
        if not norms or self.delegate.centers_norms:
            return None
        try:  # what was refused has other names in that program
            found = lower_to_edge(self.program, self.source, self.delegate.centering_norms())._proven(
                config, strict, True
            )
        except QuantflowError:
            return None
        reason = f"the mean is subtracted before the norm, since portable kernels lose precision: {finding.reason}"
        remedy = "none is needed; an input with a smaller mean saves the subtraction"
        _warn("edge", reason, ", ".join(norms), remedy, strict)
        return found

    def _faults(self, finding: Finding, config: ExecutorchBackendConfig | None, search: FaultSearch) -> set[str]:
        """The edge nodes that the delegate does not run as in the graph: all that fail alone, else the first that fails
        together with others.
        """
        if not self.delegate.partitioners() or finding.operators:
            return set()  # a portable kernel is at fault
        inputs = self.source.example_inputs
        flat = None if inputs is None or not finding.loaded else self.signature.leaves(*inputs, stage="runtime")
        apart = edge_manager(
            self.program, self.source, self.delegate, self.delegate.one_by_one(self.refused)
        ).exported_program()
        if found := search.alone(apart, flat) - self.refused:
            return found

        def wrong_without(nodes: frozenset[str]) -> bool:
            tried = lower_to_edge(self.program, self.source, self.delegate, nodes | self.refused)._serialise(config)
            return runtime_check.check(tried, self.source) is not None

        inside = [node for _, nodes in lowered_modules(self.manager.exported_program().graph_module) for node in nodes]
        return search.together(inside, wrong_without)

    def _serialise(self, config: ExecutorchBackendConfig | None) -> Program:
        for declared, dim in self.signature.unbounded():
            raise QuantflowError(
                "executorch",
                f"dimension {dim.name} has no upper bound, which memory planning needs",
                node=declared.name,
                remedy="export with dynamic_batch=N, with Dim(..., max=N), or with static shapes",
            )
        import executorch.kernels.quantized  # noqa: F401  out-variants of the quantized operators

        delegation = self.delegation()  # ``to_executorch`` changes the graph
        try:
            with lowering_state(self.manager):
                manager = run_fast(lambda: self.manager.to_executorch(config))
        except Exception as error:
            raise QuantflowError(
                "executorch",
                f"{type(error).__name__}: {error}",
                remedy="an operator without an executorch kernel must go to a delegate or be rewritten",
            ) from error
        return Program(manager.buffer, self.signature, delegation)

    def __repr__(self) -> str:
        return f"Edge({str(self.delegation()).splitlines()[0]}; inputs: {self.signature.describe_inputs()})"


def _unmended(finding: Finding, program: Program, source: ExportedProgram, over: bool) -> QuantflowError:
    """The error for a program that stays wrong with operators left out of the delegate."""
    portable = tuple(program.delegation.portable) if program.delegation is not None else ()
    searched = f"; no operator at fault was found within {SECONDS:g} s" if over else ""
    if finding.operators:
        remedy = "no kernel of this runtime supports the operator in this form: write the layer with other operators"
        names = ", ".join(_layers(source, operator) or operator for operator in finding.operators)
        return QuantflowError("runtime", finding.reason, node=names, remedy=remedy)
    if finding.ran:
        remedy = "report it with the model; to_executorch(check=False) returns the program without the comparison"
        return QuantflowError("runtime", finding.reason + searched, node="the program", remedy=remedy)
    remedy = "replace the named operator, or skip its layer in the quantizer if it is quantized"
    return QuantflowError("runtime", finding.reason + searched, node=", ".join(portable) or "forward", remedy=remedy)


def _layers(program: ExportedProgram, operator: str) -> str:
    """The layers of ``program`` that call ``operator`` (such as ``aten::cumsum.out``), with that name; ``""`` for none."""
    name = operator.partition(".")[0]
    nodes = [n for n in program.graph.nodes if getattr(schema_of(n.target), "name", "") == name]
    return f"{', '.join(map(label, nodes))} ({operator})" if nodes else ""


def _warn(stage: str, reason: str, node: str, remedy: str, strict: bool, *, depth: int = 4) -> None:
    """Warn at the line ``depth`` frames up, which called this module, or raise if ``strict``."""
    if strict:
        raise QuantflowError(stage, reason, node=node, remedy=remedy)
    warnings.warn(QuantflowWarning(stage, reason, node=node, remedy=remedy), stacklevel=depth)


def lower_to_edge(
    program: ExportedProgram, source: ExportedProgram, delegate: DelegateLike, refused: frozenset[str] = frozenset()
) -> Edge:
    """Lower a program to the edge dialect and partition it for ``delegate``, without the edge nodes named in ``refused``.

    Args:
        program: The program in core ATen, which is lowered if there is no delegate.
        source: The pre-dispatch program, which is lowered if there is a delegate; ``program`` itself if it was not decomposed.
        delegate: The delegate, as in :meth:`quantflow.CoreAten.to_edge`.
        refused: The names of edge nodes to leave out of the delegate.

    Raises:
        QuantflowError: at stage ``"edge"``.
    """
    backend = delegates.resolve(delegate)
    isolated.warm_up()  # the server starts while this process lowers
    manager, refused = compiled_edge_manager(program, source, backend, refused)
    return Edge(manager, program, source, backend, refused)
