"""Stage 2: the program in core ATen, for inference only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from quantflow import delegates
from quantflow.errors import QuantflowError
from quantflow.graph.aten import label
from quantflow.graph.explicit_copies import make_memory_explicit
from quantflow.graph.lifted import rewritten
from quantflow.graph.rewrites import CORE_REWRITES, rewrite
from quantflow.graph.written_parameters import written_parameters_as_buffers
from quantflow.signature.signature import Signature
from quantflow.upstream.decomposition import fast_decomposition

if TYPE_CHECKING:
    from quantflow.lowering.edge import Edge

# What quantization writes; executorch has kernels and fusions for it, core ATen no name.
_QUANTIZED_NAMESPACES = frozenset({"quantized_decomposed", "torchao"})

_TRAIN_ELSEWHERE = "train on Exported.module(), the pre-dispatch graph, and export the trained graph again"


@dataclass(frozen=True)
class CoreAten:
    """A program in the core ATen operator set, decomposed and functional; not safe for autograd.

    Attributes:
        program: The decomposed ``torch.export.ExportedProgram``.
        source: The pre-dispatch program it was made from. Delegates lower from this one, since they want whole what core
            ATen decomposes (linear, hardswish, gelu, ...). Equal to ``program`` for a program that came in here.
    """

    program: ExportedProgram
    source: ExportedProgram

    @property
    def signature(self) -> Signature:
        """What the program takes and returns."""
        return Signature.of_program(self.program)

    def module(self) -> GraphModule:
        """The core ATen graph as a callable, for inference: ``train()`` raises, gradients do not flow."""
        return _InferenceModule.of(self.program)

    def train(self, mode: bool = True) -> NoReturn:
        """Not here.

        Raises:
            QuantflowError: always; core ATen has lost what training needs.
        """
        _refuse_training()

    def to_edge(self, delegate: Any = None) -> Edge:
        """Lower to the edge dialect, handing what it can run to ``delegate``.

        Args:
            delegate: The name of a delegate (``"xnnpack"``), an executorch partitioner or a list of them, or None for
                executorch's portable kernels.

        Raises:
            QuantflowError: at stage ``"edge"``.
        """
        from quantflow.lowering.edge import lower_to_edge  # executorch is imported late: it costs seconds

        return lower_to_edge(self.program, self.source, delegate)

    def __repr__(self) -> str:
        calls = sum(n.op == "call_function" for n in self.program.graph.nodes)
        return f"CoreAten({calls} calls; inputs: {self.signature.describe_inputs()})"


def lower_to_core_aten(program: ExportedProgram) -> CoreAten:
    """Decompose ``program`` to core ATen and check that nothing else is left.

    What has no decomposition and can be written in core operators (adaptive maxima, medians) is written so first.
    """
    program = with_explicit_state(program)
    try:
        with fast_decomposition():
            core = rewritten(program, lambda graph: rewrite(graph, CORE_REWRITES)).run_decompositions()
    except Exception as error:
        raise QuantflowError(
            "core-aten",
            f"decomposition failed: {type(error).__name__}: {error}",
            remedy="check that the exported program runs: exported.module()(*inputs)",
        ) from error
    check_core(core)
    return CoreAten(core, program)


def straight_to_edge(program: ExportedProgram, delegate: Any) -> Edge:
    """As by way of core ATen, to the same bytes; core ATen itself, which delegates do not read, is left out.

    Raises:
        QuantflowError: as :meth:`CoreAten.to_edge` does, and at stage ``"core-aten"``.
    """
    from quantflow.lowering.edge import lower_to_edge  # executorch is imported late: it costs seconds

    if delegates.resolve(delegate).partitioners():
        try:
            explicit = with_explicit_state(program)
            return lower_to_edge(explicit, explicit, delegate)
        except QuantflowError:  # core ATen may know better which operator is at fault
            pass
    return lower_to_core_aten(program).to_edge(delegate)


def with_explicit_state(program: ExportedProgram) -> ExportedProgram:
    """``program`` with what decompositions and lowering take for granted: written state in buffers, copies that are copies."""
    return rewritten(written_parameters_as_buffers(program), make_memory_explicit)


def check_core(program: ExportedProgram) -> None:
    """Raise a :class:`QuantflowError` that names the first operator of ``program`` outside core ATen."""
    for submodule in program.graph_module.modules():
        if not isinstance(submodule, GraphModule):
            continue
        for node in submodule.graph.nodes:
            target = node.target
            if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
                continue
            if torch.Tag.core in target.tags or target.namespace in _QUANTIZED_NAMESPACES:
                continue
            if target.namespace == "aten" and not target._schema.returns:
                continue  # an assertion computes nothing
            raise QuantflowError(
                "core-aten",
                f"{target} is not in core ATen and has no decomposition into it",
                node=label(node),
                remedy="register a decomposition for it, or rewrite the layer in terms of core operators",
            )


def _refuse_training() -> NoReturn:
    raise QuantflowError("core-aten", "core ATen is not safe for autograd", node="train", remedy=_TRAIN_ELSEWHERE)


class _InferenceModule(GraphModule):
    """A decomposed graph that can be called but not trained."""

    @classmethod
    def of(cls, program: ExportedProgram) -> _InferenceModule:
        root = program.module(check_guards=False)
        module = cls(root, root.graph)
        module.training = False
        module.requires_grad_(False)
        return module

    def train(self, mode: bool = True) -> _InferenceModule:
        if mode:
            _refuse_training()
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            _refuse_training()
        with torch.no_grad():
            return super().__call__(*args, **kwargs)
