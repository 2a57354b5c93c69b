"""The result of stage 1: a pre-dispatch ATen program that is safe for autograd."""

from __future__ import annotations

from dataclasses import dataclass

from torch.export import ExportedProgram

from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.lowering.core_aten import CoreAten, lower_to_core_aten
from quantflow.signature.signature import Signature

INFERENCE_ONLY = "quantflow_inference_only"  # GraphModule.meta: Exported.inference_only of the capture


@dataclass(frozen=True)
class Exported:
    """A captured model: pre-dispatch ATen, the full operator set, safe for autograd.

    Attributes:
        program: The ``torch.export.ExportedProgram``, in inference mode.
        training: The mode that the model was in when it was captured, and that the graph of :meth:`module` starts in.
        inference_only: Names of layers and nodes whose behaviour in training is not, or not for certain, in the graph.
            Stochastic depth, auxiliary heads, weights merged by ``train()``, and dropout and batch norm inside branches
            behave as in inference, in both modes. A name that ends in ``in an unknown mode`` is of a node of which the
            capture could not tell whether it follows the mode; that node follows it. :func:`quantflow.train` warns of all.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU())
        >>> exported = qf.export(model, (torch.randn(1, 3, 8, 8),))
        >>> exported
        Exported(pre-dispatch ATen, 2 calls; inputs: input float32[1, 3, 8, 8])
        >>> graph = exported.module()
        >>> tuple(graph(torch.randn(1, 3, 8, 8)).shape)
        (1, 8, 6, 6)
    """

    program: ExportedProgram
    training: bool = False
    inference_only: tuple[str, ...] = ()

    @property
    def signature(self) -> Signature:
        """The names, dtypes, shapes and structure of the program's inputs and outputs."""
        return Signature.of_program(self.program)

    def module(self) -> TrainableGraphModule:
        """Return the graph as a module of its own: to call, to train, to quantize. Its parameters are copies."""
        module = TrainableGraphModule.from_program(self.program)
        module.meta["quantflow_signature"] = self.signature
        module.meta[INFERENCE_ONLY] = self.inference_only
        return module.train(self.training)

    def to_core_aten(self) -> CoreAten:
        """Decompose the program to the core ATen operator set, for inference (stage 2).

        Raises:
            QuantflowError: at stage ``"core-aten"``, naming the operator that has no core form.
        """
        return lower_to_core_aten(self.program)

    def __repr__(self) -> str:
        calls = sum(n.op == "call_function" for n in self.program.graph.nodes)
        return f"Exported(pre-dispatch ATen, {calls} calls; inputs: {self.signature.describe_inputs()})"
