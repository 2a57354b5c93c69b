"""How tensors lie in memory: contiguous, which is how the runtime reads them."""

from __future__ import annotations

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.fx import Node
from torch.fx.passes.fake_tensor_prop import FakeTensorProp


def make_contiguous(program: ExportedProgram) -> ExportedProgram:
    """``program`` as if it had been captured with contiguous inputs and weights. Changed in place; weights become copies.

    A model or an example in ``channels_last`` leaves its layout in the program: inputs would be read in it whatever their own,
    and passes of delegates fail on it.
    """
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
    odd = [n for n in placeholders if _is_odd(n.meta.get("val"))]
    if not odd:
        return program
    mode = odd[0].meta["val"].fake_mode
    with mode:
        for node in odd:
            node.meta["val"] = node.meta["val"].contiguous()
    FakeTensorProp(program.graph_module, mode).propagate_dont_convert_inputs(*(n.meta.get("val") for n in placeholders))
    _make_state_contiguous(program, odd)
    return program


def _make_state_contiguous(program: ExportedProgram, odd: list[Node]) -> None:
    signature = program.graph_signature
    names = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    for name in (names[node.name] for node in odd if node.name in names):
        state = program.state_dict if name in program.state_dict else program.constants
        tensor = state[name]
        made = tensor.detach().contiguous()
        state[name] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _is_odd(val: object) -> bool:
    return isinstance(val, FakeTensor) and val.layout == torch.strided and not val.is_contiguous()
