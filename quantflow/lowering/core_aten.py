"""Stage 2: a program in core ATen, for inference only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule

from quantflow import delegates
from quantflow.delegates import DelegateLike
from quantflow.errors import QuantflowError
from quantflow.graph.aten import label
from quantflow.graph.explicit_copies import make_memory_explicit
from quantflow.graph.lifted import rewritten
from quantflow.graph.rewrites import CORE_REWRITES, rewrite
from quantflow.graph.written_parameters import written_parameters_as_buffers
from quantflow.signature.signature import Signature
from quantflow.upstream.decomposition import fast_decomposition
from quantflow.upstream.operators import OpOverload, schema_of

if TYPE_CHECKING:
    from quantflow.lowering.edge import Edge

# Namespaces of quantization operators. executorch has kernels and fusions for them; core ATen does not contain them.
_QUANTIZED_NAMESPACES = frozenset({"quantized_decomposed", "torchao"})

_TRAIN_ELSEWHERE = "train on Exported.module(), the pre-dispatch graph, and export the trained graph again"


@dataclass(frozen=True)
class CoreAten:
    """A program in the core ATen operator set, decomposed and functional; not safe for autograd.

    Attributes:
        program: The decomposed ``torch.export.ExportedProgram``.
        source: The pre-dispatch program it was made from. Delegates lower from this one, since they want whole what core
            ATen decomposes (linear, hardswish, gelu, ...).

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.Hardswish()).eval()
        >>> core = qf.export(model, (torch.randn(1, 8),)).to_core_aten()
        >>> sorted({n.target.__name__ for n in core.program.graph.nodes if n.op == "call_function"})[:3]
        ['add.Tensor', 'addmm.default', 'clamp.default']
    """

    program: ExportedProgram
    source: ExportedProgram

    @property
    def signature(self) -> Signature:
        """The names, dtypes, shapes and structure of the program's inputs and outputs."""
        return Signature.of_program(self.program)

    def module(self) -> GraphModule:
        """Return the core ATen graph as a callable, for inference: ``train()`` raises, gradients do not flow."""
        return _InferenceModule.of(self.program)

    def train(self, mode: bool = True) -> NoReturn:
        """Refuse: core ATen does not hold what training needs.

        Args:
            mode: Not used.

        Raises:
            QuantflowError: always; train on ``Exported.module()`` instead.
        """
        _refuse_training()

    def to_edge(self, delegate: DelegateLike = None) -> Edge:
        """Lower to the edge dialect; the delegate gets the operators that it can run.

        Args:
            delegate: The name of a delegate (``"xnnpack"``), an executorch partitioner or a list of them, or None for
                executorch's portable kernels.

        Returns:
            The program in the edge dialect, partitioned to its delegates.

        Raises:
            QuantflowError: at stage ``"edge"``, for an unknown delegate or when lowering fails.
        """
        from quantflow.lowering.edge import lower_to_edge  # the import of executorch takes seconds, so it is late

        return lower_to_edge(self.program, self.source, delegate)

    def __repr__(self) -> str:
        calls = sum(n.op == "call_function" for n in self.program.graph.nodes)
        return f"CoreAten({calls} calls; inputs: {self.signature.describe_inputs()})"


def lower_to_core_aten(program: ExportedProgram) -> CoreAten:
    """Decompose ``program`` to core ATen and check that no other operator is left.

    Operators without a decomposition that can be rewritten in core operators (adaptive max pools, medians) are rewritten first.
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


def straight_to_edge(program: ExportedProgram, delegate: DelegateLike) -> Edge:
    """Lower ``program`` to the edge dialect without core ATen, which delegates do not read. The result is the same.

    Raises:
        QuantflowError: as :meth:`CoreAten.to_edge` does, and at stage ``"core-aten"``.
    """
    from quantflow.lowering.edge import lower_to_edge  # the import of executorch takes seconds, so it is late

    if delegates.resolve(delegate).partitioners():
        try:
            explicit = with_explicit_state(program)
            return lower_to_edge(explicit, explicit, delegate)
        except QuantflowError:  # the error from core ATen may name the faulty operator more exactly
            pass
    return lower_to_core_aten(program).to_edge(delegate)


def with_explicit_state(program: ExportedProgram) -> ExportedProgram:
    """Return ``program`` in the form that decomposition and lowering need: written state in buffers, and explicit copies."""
    return rewritten(written_parameters_as_buffers(program), make_memory_explicit)


def check_core(program: ExportedProgram) -> None:
    """Raise a :class:`QuantflowError` that names the first operator of ``program`` outside core ATen."""
    for submodule in program.graph_module.modules():
        if not isinstance(submodule, GraphModule):
            continue
        for node in submodule.graph.nodes:
            target = node.target
            if node.op != "call_function" or not isinstance(target, OpOverload):
                continue
            if torch.Tag.core in target.tags or target.namespace in _QUANTIZED_NAMESPACES:
                continue
            if target.namespace == "aten" and not schema_of(target).returns:
                continue  # an assertion has no result
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
