"""Conversion of a program to contiguous tensors, the only memory layout that the runtime reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from quantflow.errors import QuantflowError
from quantflow.graph.aten import aten, label
from quantflow.upstream.fake_tensors import FakeTensor


def make_contiguous(program: ExportedProgram) -> ExportedProgram:
    """Convert ``program`` to contiguous inputs and weights, as if it had been captured with them, and return it.

    The program is changed in place, and weights become copies. A program captured from a ``channels_last`` model or example
    would read every input in that layout, and passes of delegates would fail.
    """
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    odd = [n for n in placeholders if _is_odd(n.meta.get("val"))]
    if not odd:
        return program
    if strided := next((n for n in program.graph.nodes if n.target is aten.as_strided.default), None):
        remedy = "make the model and examples contiguous: model.to(memory_format=torch.contiguous_format)"
        reason = "the program reads memory by strides, and the runtime uses contiguous strides"
        raise QuantflowError("export", reason, node=label(strided), remedy=remedy)
    mode = odd[0].meta["val"].fake_mode
    with mode:
        for node in odd:
            node.meta["val"] = torch.empty_like(node.meta["val"], memory_format=torch.contiguous_format)
    _Propagation(program.graph_module, mode).propagate_dont_convert_inputs(*(n.meta.get("val") for n in placeholders))
    _make_state_contiguous(program, odd)
    return program


class _Propagation(FakeTensorProp):
    """Recomputes every value. A view that is invalid in the contiguous layout becomes a reshape."""

    def run_node(self, n: Node) -> Any:
        """Return the value of ``n``."""
        try:
            return super().run_node(n)
        except (RuntimeError, ValueError):
            if n.target is not aten.view.default:
                raise
            n.target = aten.reshape.default
            return super().run_node(n)


def _make_state_contiguous(program: ExportedProgram, odd: list[Node]) -> None:
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    copies: dict[int, torch.Tensor] = {}  # by id of the source: a tensor with several names stays shared
    for name in (names[node.name] for node in odd if node.name in names):
        state = program.state_dict if name in program.state_dict else program.constants
        tensor = state[name]
        if id(tensor) not in copies:
            made = tensor.detach().clone(memory_format=torch.contiguous_format)
            copies[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
        state[name] = copies[id(tensor)]


def _is_odd(val: object) -> bool:
    """Whether the strides of ``val`` are not contiguous. Those of a dimension of size one count: executorch reads them too."""
    if not isinstance(val, FakeTensor) or val.layout != torch.strided:
        return False
    if not val.is_contiguous():
        return True
    pairs = zip(val.stride(), torch.empty_like(val, memory_format=torch.contiguous_format).stride(), strict=True)
    return any(isinstance(ours, int) and isinstance(plain, int) and ours != plain for ours, plain in pairs)
