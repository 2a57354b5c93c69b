"""Layers whose training behaviour a capture in inference mode can't hold."""

from __future__ import annotations

import inspect
import re

from torch import nn
from torch.fx import GraphModule

# Dropout and batch norm switch on their nodes, whether called as layers or with ``training=self.training``.
_SWITCHED_ON_NODES = re.compile(r"training\s*=\s*self\.training|dropout\w*\([^()]*self\.training[^()]*\)")


def captured_as_inference(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers of ``model`` that branch on ``self.training`` in ways that no node shows.

    Stochastic depth, auxiliary heads and dropout inside attention are such. Read off the source of their classes, so a layer
    that is listed may in fact do the same in both modes.
    """
    return tuple(f"{name} ({type(m).__name__})".lstrip() for name, m in model.named_modules() if _branches(m))


def _branches(module: nn.Module) -> bool:
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    if kind.__module__.startswith("torch.nn.") or isinstance(module, GraphModule):
        return False
    switches = (getattr(module, name, None) for name in ("p", "drop_prob", "aux_logits"))
    if any(isinstance(switch, (int, float)) and not switch for switch in switches):
        return False  # switched off
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # typed into a console
        return False
    return "self.training" in _SWITCHED_ON_NODES.sub("", source)
