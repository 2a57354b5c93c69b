"""The quantizer that is registered for a delegate."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from torchao.quantization.pt2e.quantizer import Quantizer

from quantflow.delegates import DelegateLike
from quantflow.errors import QuantflowError


def default_quantizer(delegate: DelegateLike, **settings: Any) -> Quantizer:
    """The quantizer registered for ``delegate``, constructed with ``settings``.

    Raises:
        QuantflowError: at stage ``"prepare"``, if no quantizer is registered for ``delegate``.
    """
    registered = {entry.name: entry for entry in entry_points(group="quantflow.quantizers")}
    if not isinstance(delegate, str) or delegate not in registered:
        raise QuantflowError(
            "prepare",
            f"no quantizer is registered for delegate {delegate!r}",
            node="quantizer",
            remedy=f"pass quantizer=...; registered: {sorted(registered)}",
        )
    return registered[delegate].load()(**settings)
