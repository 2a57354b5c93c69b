"""The ``export`` function of stage 1: it captures a model or accepts a program captured elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from quantflow.capture.batch_of_one import check_batch_of_one
from quantflow.capture.capture_errors import why_not
from quantflow.capture.dynamic_batch import with_dynamic_batch
from quantflow.capture.exported import INFERENCE_ONLY, Exported
from quantflow.errors import QuantflowError
from quantflow.graph import modes, provenance
from quantflow.graph.dropout_capture import DistinctDropouts, erase_aliases, freeze_ambiguous
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.graph.inference_mode import inference_mode
from quantflow.graph.inference_only import captured_as_inference
from quantflow.graph.layout import make_contiguous
from quantflow.graph.never_trained import freeze_unswitched, mark_modes
from quantflow.graph.regions import nodes_of
from quantflow.observers.observation import observers_of
from quantflow.signature.signature import DynamicDim, Signature
from quantflow.upstream import pytree
from quantflow.upstream.graph_modules import pytree_info_of

# The dynamic dimensions of each input, in the structure of the inputs, as ``torch.export`` takes them.
DynamicShapes: TypeAlias = dict[str, Any] | tuple[Any, ...] | list[Any] | None


def export(
    model: nn.Module | ExportedProgram,
    args: Sequence[object] = (),
    kwargs: Mapping[str, object] | None = None,
    *,
    dynamic_shapes: DynamicShapes = None,
    dynamic_batch: bool | int = False,
    strict: bool = False,
) -> Exported:
    """Capture ``model`` as a pre-dispatch ATen program.

    The model is captured in inference mode and left as it was; :meth:`Exported.module` switches between training and
    inference on the nodes. Layers that ``model.train()`` itself leaves in inference mode stay in it.

    Args:
        model: An ``nn.Module`` (eager, a captured graph, a converted graph) or an ``ExportedProgram`` from elsewhere. Of an
            ``ExportedProgram`` the other arguments are not used.
        args: Example positional inputs, a tuple. Their dtypes are those of the program, and their shapes where static.
        kwargs: Example keyword inputs.
        dynamic_shapes: Which dimensions vary, as in ``torch.export.export``. Shapes are static unless asked.
        dynamic_batch: True makes dimension 0 of every tensor input one dynamic batch dimension, also when the example
            has a batch of one; an int bounds it, which lowering needs. Other dimensions vary as ``dynamic_shapes`` says.
        strict: As in ``torch.export.export``.

    Returns:
        The captured program.

    Raises:
        QuantflowError: at stage ``"export"``, when the model can't be captured, is prepared but not converted, or the
            arguments do not fit together.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 4))
        >>> exported = qf.export(model, (torch.randn(1, 3, 4, 4),), dynamic_batch=True)
        >>> tuple(exported.module()(torch.randn(5, 3, 4, 4)).shape)
        (5, 4)
    """
    if isinstance(model, ExportedProgram):
        return _take_in(model)
    if not isinstance(model, nn.Module):
        raise QuantflowError(
            "export", f"{type(model).__name__} is not a module", node="model", remedy="pass a module or ExportedProgram"
        )
    if isinstance(args, torch.Tensor) or not isinstance(args, Sequence):
        raise QuantflowError("export", "example inputs are no tuple", node="args", remedy="pass (x,) for one input x")
    if observers_of(model):
        raise QuantflowError(
            "export",
            "the graph is prepared but not converted",
            node=next(iter(observers_of(model))),
            remedy="call qf.convert(graph) first",
        )
    if kwargs is not None and not isinstance(kwargs, Mapping):
        reason = f"the keyword inputs are a {type(kwargs).__name__}"
        raise QuantflowError("export", reason, node="kwargs", remedy="pass a dict; pass other arguments by name")
    positional, keyword = given = _distinct(tuple(args), _in_captured_order(model, dict(kwargs or {})))
    if dynamic_batch:
        positional, keyword, dynamic_shapes = with_dynamic_batch(
            model, positional, keyword, dynamic_batch, dynamic_shapes
        )
    training = model.training
    # A capture under no_grad would wrap the whole program in one opaque region.
    with inference_mode(model), torch.enable_grad():
        try:
            with DistinctDropouts():
                program = torch.export.export(model, positional, keyword, dynamic_shapes=dynamic_shapes, strict=strict)
            erase_aliases(program)
            program = make_contiguous(program)
            if _differ(given, (positional, keyword)):
                check_batch_of_one(model, program, *given)
        except QuantflowError:
            raise
        except Exception as error:
            raise why_not(model, given, (positional, keyword) if dynamic_batch else None, error) from error
        if isinstance(model, GraphModule) and not isinstance(model, TrainableGraphModule):
            return _take_in(program)  # the nodes of the graph hold its mode
        unclear = mark_modes(model, program, lambda: _captured(model, positional, keyword, strict))
    unclear += freeze_unswitched(program)
    provenance.shorten(program.graph)
    inherited = model.meta.get(INFERENCE_ONLY, ()) if isinstance(model, GraphModule) else captured_as_inference(model)
    return Exported(program, training, tuple(dict.fromkeys((*inherited, *unclear))))


def _differ(given: tuple, widened: tuple) -> bool:
    """Whether an example was doubled to capture a dynamic batch."""
    return any(ours is not theirs for ours, theirs in zip(*map(pytree.tree_leaves, (given, widened)), strict=True))


def _captured(model: nn.Module, args: tuple, kwargs: dict[str, Any], strict: bool) -> ExportedProgram:
    """The program of ``model`` in its current mode. Batch norm can fail to train on a batch of one; two rows are used then."""
    try:
        return torch.export.export(model, args, kwargs, strict=strict)
    except Exception:
        args, kwargs, _ = with_dynamic_batch(model, args, kwargs, True)
        return torch.export.export(model, args, kwargs, strict=strict)


def _distinct(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The inputs with repeated tensors cloned. The tracer would merge two uses of one tensor into one input."""
    seen: set[int] = set()

    def own(leaf: object) -> object:
        if isinstance(leaf, torch.Tensor) and id(leaf) in seen:
            return leaf.clone()
        seen.add(id(leaf))
        return leaf

    return pytree.tree_map(own, (args, kwargs))


def _in_captured_order(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keyword inputs in the order in which a captured graph reads them."""
    info = pytree_info_of(model.graph) if isinstance(model, GraphModule) else None
    names = info.in_spec.children()[1].context if info is not None else None
    return {name: kwargs[name] for name in names} if names and sorted(names) == sorted(kwargs) else kwargs


def _take_in(program: ExportedProgram) -> Exported:
    """Accept a program exported elsewhere. A program captured in training mode is captured again in inference mode."""
    program = make_contiguous(program)
    captured_in_training = modes.training_literals(nodes_of(program.graph_module))
    if not captured_in_training:
        unclear = freeze_ambiguous(program)
        modes.mark_switched(nodes_of(program.graph_module))
        return Exported(program, inference_only=(*unclear, *freeze_unswitched(program)))
    if program.example_inputs is None:
        raise QuantflowError(
            "export",
            "the program was captured in training mode and holds no example inputs to capture it again",
            node=captured_in_training[0].name,
            remedy="export model.eval(), or pass the model itself to qf.export",
        )
    modes.mark_frozen(nodes_of(program.graph_module))
    graph = TrainableGraphModule.from_program(program)
    modes.mark_all(graph.graph.nodes)
    graph.training = True
    graph.eval()
    args, kwargs = program.example_inputs
    signature = Signature.of_program(program)
    made: dict[str, Any] = {}

    def dim(size: DynamicDim) -> Dim | int:
        return made.setdefault(size.name, Dim(size.name, min=size.min, max=size.max))

    dims = [{i: dim(d) for i, d in enumerate(s.shape) if isinstance(d, DynamicDim)} or None for s in signature.inputs]
    dynamic_shapes = None
    if any(dims):
        positional, keyword = pytree.tree_unflatten(dims, pytree.tree_structure((args, kwargs)))
        dynamic_shapes = (*positional, *keyword.values())
    again = export(graph, args, kwargs, dynamic_shapes=dynamic_shapes)
    return Exported(again.program, training=True, inference_only=again.inference_only)
