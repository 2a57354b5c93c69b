"""The check that a model treats a batch of one like larger batches, for captures from an example that was doubled."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.func import functional_call

from quantflow.errors import QuantflowError
from quantflow.upstream import pytree
from quantflow.upstream.fake_tensors import FakeTensorMode

_REMEDY = "pass dynamic_batch=False, or name the dimension where the model drops one of size one: x.squeeze(dim)"


def check_batch_of_one(model: nn.Module, program: ExportedProgram, args: tuple, kwargs: dict[str, Any]) -> None:
    """Refuse a dynamic batch where the outputs of the example, a batch of one, have other dimensions than those captured.

    Args:
        model: The model, in inference mode.
        program: What was captured from a batch of two.
        args: The example inputs.
        kwargs: The keyword inputs.

    Raises:
        QuantflowError: at stage ``"export"``.
    """
    mode = FakeTensorMode(
        allow_non_fake_inputs=True
    )  # no tensor of the model is written, and no random number is drawn
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state, args, kwargs = pytree.tree_map_only(torch.Tensor, mode.from_tensor, (state, args, kwargs))
    try:
        with mode, torch.no_grad():
            found = pytree.tree_leaves(functional_call(model, state, args, kwargs))
    except Exception:  # it depends on the data: this can't be told
        return
    nodes = {node.name: node for node in program.graph.nodes}
    captured = [nodes[name].meta.get("val") if name in nodes else None for name in program.graph_signature.user_outputs]
    for index, (ours, theirs) in enumerate(zip(found, captured, strict=False)):
        if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
            continue
        pairs = zip(ours.shape, theirs.shape, strict=False)
        if ours.ndim != theirs.ndim or any(isinstance(size, int) and own != size for own, size in pairs):
            reason = (
                f"output {index} has the shape {list(ours.shape)} for a batch of one, {list(theirs.shape)} for others"
            )
            raise QuantflowError("export", reason, node="dynamic_batch", remedy=_REMEDY)
