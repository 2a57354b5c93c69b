"""The earlier names of this API. They still work, with a deprecation warning that gives the new name."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from torch import nn

from quantflow.capture.export import export
from quantflow.graph.graph_module import TrainableGraphModule
from quantflow.lowering.core_aten import CoreAten


def _warn(old: str, new: str) -> None:
    warnings.warn(f"{old} is the old name: use {new}", DeprecationWarning, stacklevel=3)


def capture_pre_autograd_graph(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object] | None = None, *, dynamic_shapes: Any = None
) -> TrainableGraphModule:
    """The old name of ``qf.export(model, args).module()``."""
    _warn("capture_pre_autograd_graph(model, args)", "qf.export(model, args).module()")
    return export(model, args, kwargs, dynamic_shapes=dynamic_shapes).module()


def _capture(model: nn.Module, args: Sequence[object], config: Any = None, *, dynamic_shapes: Any = None) -> CoreAten:
    """The old name of ``qf.export(model, args).to_core_aten()``; ``config`` is ignored."""
    _warn("exir.capture(model, args)", "qf.export(model, args).to_core_aten()")
    return export(model, args, dynamic_shapes=dynamic_shapes).to_core_aten()


exir = SimpleNamespace(capture=_capture)
"""A namespace like the former module ``exir``: ``exir.capture(model, args).to_edge().to_executorch()``."""
