"""The tables that a ``torch.nn.Module`` keeps of its own parameters, buffers and submodules, and the base class of norms.

Names: ``_parameters``, ``_buffers``, ``_modules`` and ``_non_persistent_buffers_set`` of a module;
``torch.nn.modules.batchnorm._NormBase``. The public methods give a copy without None, and can't replace a tensor in place or
tell which buffers are persistent. There is no fall-back.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase as NormBase

__all__ = ["NormBase", "non_persistent_buffers", "own_buffers", "own_modules", "own_parameters"]


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """Return the module's table of its own parameters. A change of the table changes the module."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the module's table of its own buffers. A change of the table changes the module."""
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the module's table of its own submodules. A change of the table changes the module."""
    return module._modules


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """Return the module's set of the names of buffers outside its ``state_dict``. A change of the set changes the module."""
    return module._non_persistent_buffers_set
