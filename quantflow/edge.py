"""The edge dialect, where delegation enters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from quantflow import delegates
from quantflow.core_aten import CoreAten
from quantflow.delegates.delegation import Delegation
from quantflow.errors import QuantflowError
from quantflow.program import SIGNATURE_METHOD, Program
from quantflow.signature import Signature


@dataclass(frozen=True)
class Edge:
    """A program in executorch's edge dialect, partitioned to its delegates.

    Attributes:
        manager: The ``executorch.exir.EdgeProgramManager``.
        signature: What the program takes and returns.
    """

    manager: Any
    signature: Signature

    def delegation(self) -> Delegation:
        """What the delegates run, and what is left outside."""
        return Delegation.of(self.manager.exported_program().graph_module)

    def to_executorch(self, config: Any = None) -> Program:
        """Plan memory, take out-variants and serialise.

        Args:
            config: An ``executorch.exir.ExecutorchBackendConfig``, or None for its defaults.

        Raises:
            QuantflowError: at stage ``"executorch"``; a dynamic dimension without upper bound is named.
        """
        for declared, dim in self.signature.unbounded():
            raise QuantflowError(
                "executorch",
                f"dimension {dim.name} has no upper bound, and memory is planned ahead",
                node=declared.name,
                remedy="export with dynamic_batch=N, with Dim(..., max=N), or with static shapes",
            )
        import executorch.kernels.quantized  # noqa: F401  out-variants of the quantized operators

        try:
            manager = self.manager.to_executorch(config)
        except Exception as error:
            raise QuantflowError(
                "executorch",
                f"{type(error).__name__}: {error}",
                remedy="an operator without an executorch kernel must go to a delegate or be rewritten",
            ) from error
        return Program(manager.buffer, self.signature, self.delegation())

    def __repr__(self) -> str:
        return f"Edge({str(self.delegation()).splitlines()[0]}; inputs: {self.signature.describe_inputs()})"


def lower_to_edge(core: CoreAten, delegate: Any) -> Edge:
    """Lower ``core`` to the edge dialect and partition it for ``delegate``."""
    from executorch import exir

    backend = delegates.resolve(delegate)
    partitioners = backend.partitioners()
    constant_methods = {SIGNATURE_METHOD: core.signature.to_json()}
    try:
        if partitioners:
            manager = exir.to_edge_transform_and_lower(
                core.source,
                transform_passes=backend.passes() or None,
                partitioner=partitioners,
                constant_methods=constant_methods,
            )
        else:
            manager = exir.to_edge(core.program, constant_methods=constant_methods)
    except Exception as error:
        raise QuantflowError(
            "edge",
            f"{type(error).__name__}: {error}",
            remedy="to_edge(None) tells whether the delegate is the cause",
        ) from error
    return Edge(manager, core.signature)
