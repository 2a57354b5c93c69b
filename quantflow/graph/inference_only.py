"""Detection of layers whose training behaviour a capture in inference mode loses."""

from __future__ import annotations

import functools
import inspect
import re

from torch import nn
from torch.fx import GraphModule

# Dropout and batch norm switch on their nodes, whether called as layers or with ``training=self.training``. Gradient
# checkpointing does not change the result.
_SWITCHED_ON_NODES = re.compile(
    r"training\s*=\s*self\.training|dropout\w*\([^()]*self\.training[^()]*\)"
    r"|gradient_checkpointing and self\.training|self\.training and self\.gradient_checkpointing"
)


def captured_as_inference(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the layers of ``model`` that branch on ``self.training`` in ways that no node shows.

    Examples are stochastic depth, auxiliary heads and dropout inside attention. The search reads the source of the classes, so
    a listed layer may compute the same in both modes.
    """
    return tuple(f"{name} ({type(m).__name__})".lstrip() for name, m in model.named_modules() if _branches(m))


def _branches(module: nn.Module) -> bool:
    if isinstance(module, GraphModule):
        return False
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        return True
    switches = [getattr(module, name, None) for name in ("p", "drop_prob", "aux_logits")]
    known = [switch for switch in switches if isinstance(switch, (int, float))]
    if known and not any(known):
        return False  # the layer is disabled
    # A subclass may inherit its forward, or a part of it, from any base class.
    return any("self.training" in _SWITCHED_ON_NODES.sub("", _source(kind)) for kind in type(module).__mro__)


@functools.cache
def _source(kind: type) -> str:
    """The source of a class; empty for classes of torch.nn, which switch on their nodes."""
    if kind.__module__.startswith("torch.nn.") or kind is object:
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # typed into a console, or written in C
        return ""
