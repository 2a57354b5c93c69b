"""Lowering to executorch's edge dialect, without the operators on which a delegate's compiler fails."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch.export import ExportedProgram
from torch.fx import Node

from quantflow.delegates.compile_errors import being_compiled
from quantflow.delegates.delegate import Delegate
from quantflow.errors import QuantflowError, QuantflowWarning
from quantflow.graph.aten import label
from quantflow.graph.containers import with_plain_containers
from quantflow.graph.lifted import rewritten
from quantflow.lowering.fault_search import FaultSearch
from quantflow.pte import SIGNATURE_METHOD
from quantflow.signature.signature import Signature
from quantflow.upstream.lowering.fast_lowering import run_fast

if TYPE_CHECKING:
    from executorch.exir.backend.partitioner import Partitioner
    from executorch.exir.program import EdgeProgramManager

_NAMED = 8  # the number of layers that a message names


def edge_manager(
    program: ExportedProgram, source: ExportedProgram, backend: Delegate, partitioners: list[Partitioner]
) -> EdgeProgramManager:
    """Return the ``executorch.exir.EdgeProgramManager`` of a program, partitioned by ``partitioners``.

    Raises:
        QuantflowError: at stage ``"edge"``.
    """
    from executorch import exir

    constant_methods = {SIGNATURE_METHOD: Signature.of_program(program).to_json()}

    def lower(rewritten_source: ExportedProgram) -> EdgeProgramManager:
        if not partitioners:
            core = program if rewritten_source is source else rewritten_source.run_decompositions()
            return exir.to_edge(core, constant_methods=constant_methods)
        passes = backend.passes() or None
        return exir.to_edge_transform_and_lower(
            rewritten_source, transform_passes=passes, partitioner=partitioners, constant_methods=constant_methods
        )

    try:
        rewritten_source = with_plain_containers(rewritten(source, backend.rewrite_for_lowering))
        return run_fast(lambda: lower(rewritten_source))
    except QuantflowError:
        raise
    except Exception as error:
        raise QuantflowError(
            "edge",
            f"{type(error).__name__}: {error}",
            remedy="the named operator can't be lowered in this form: write the layer in terms of other operators",
        ) from error


def compiled_edge_manager(
    program: ExportedProgram, source: ExportedProgram, backend: Delegate, refused: frozenset[str]
) -> tuple[EdgeProgramManager, frozenset[str]]:
    """Return the manager of :func:`edge_manager`, partitioned by the partitioners of ``backend``. An operator on which the
    delegate's compiler fails is named in a warning and left to portable kernels.

    Args:
        program: The program in core ATen.
        source: The pre-dispatch program.
        backend: The delegate to partition for.
        refused: Edge nodes to leave out of the delegate.

    Returns:
        The manager, and the edge nodes that were left out.

    Raises:
        QuantflowError: at stage ``"edge"``.
    """
    search = FaultSearch()

    def lower(partitioners: list[Partitioner]) -> EdgeProgramManager:
        return edge_manager(program, source, backend, partitioners)

    while True:
        try:
            return lower(backend.partitioners(refused)), refused
        except QuantflowError as error:
            given = being_compiled(error)
            faulty = _not_compiled(lower, backend, refused, given, search) - refused
            if not faulty:
                raise _naming(error, given) from error.__cause__
            names = ", ".join(sorted(search.names[name] for name in faulty))
            reason = f"the delegate's compiler fails: {error.reason}"
            remedy = "skip these layers in the quantizer, or let them run in portable kernels"
            warnings.warn(QuantflowWarning("edge", reason, node=names, remedy=remedy), stacklevel=4)
            refused |= faulty


def _not_compiled(
    lower: Callable[[list[Partitioner]], EdgeProgramManager],
    backend: Delegate,
    refused: frozenset[str],
    given: list[Node],
    search: FaultSearch,
) -> set[str]:
    """The operators of ``given`` on which the delegate's compiler fails alone, else the first on which it fails together with
    others.
    """
    alone: set[str] = set()
    if not given or not backend.one_by_one():
        return alone

    def failure(partitioners: list[Partitioner]) -> list[Node]:
        try:
            lower(partitioners)
        except QuantflowError as error:
            return being_compiled(error)
        return []

    while not search.over and (found := search.named(failure(backend.one_by_one(refused | alone))) - alone):
        alone |= found
    if alone:
        return alone
    candidates = {node.name: node for node in given}
    # Without these, another call of the delegate may fail.
    while further := failure(backend.partitioners(refused | candidates.keys())):
        if search.over or all(node.name in candidates for node in further):
            return set()
        candidates |= {node.name: node for node in further}
    return search.together(
        list(candidates.values()), lambda nodes: bool(failure(backend.partitioners(refused | nodes)))
    )


def _naming(error: QuantflowError, given: list[Node]) -> QuantflowError:
    """``error`` with the layers of the operators that the delegate's compiler compiled, if the error names none."""
    if not given or error.node is not None:
        return error
    names = [label(node) for node in given]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return QuantflowError(error.stage, error.reason, node=", ".join(names[:_NAMED]) + more, remedy=error.remedy)
