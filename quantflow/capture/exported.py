"""Stage 1: the pre-dispatch ATen program, autograd-safe."""

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
        training: The mode that the model was in when it was captured, and that :meth:`module` starts in.
        inference_only: Layers that behave otherwise in training in ways that no node shows (stochastic depth, auxiliary
            heads, weights merged by ``train()``): the graph has them as in inference, in both modes. So it has dropout and
            batch norm in branches. A call ``in an unknown mode`` follows the mode. :func:`quantflow.train` warns of all.
    """

    program: ExportedProgram
    training: bool = False
    inference_only: tuple[str, ...] = ()

    @property
    def signature(self) -> Signature:
        """What the program takes and returns."""
        return Signature.of_program(self.program)

    def module(self) -> TrainableGraphModule:
        """The graph as a module of its own: to call, to train, to quantize. Its parameters are copies."""
        module = TrainableGraphModule.from_program(self.program)
        module.meta["quantflow_signature"] = self.signature
        module.meta[INFERENCE_ONLY] = self.inference_only
        return module.train(self.training)

    def to_core_aten(self) -> CoreAten:
        """Stage 2: decompose to the core ATen operator set, for inference.

        Raises:
            QuantflowError: at stage ``"core-aten"``, naming the operator that has no core form.
        """
        return lower_to_core_aten(self.program)

    def __repr__(self) -> str:
        calls = sum(n.op == "call_function" for n in self.program.graph.nodes)
        return f"Exported(pre-dispatch ATen, {calls} calls; inputs: {self.signature.describe_inputs()})"
