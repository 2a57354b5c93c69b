"""One row of a quantization plan, as text."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OperatorPlan:
    """One row of a plan.

    Attributes:
        layer: The module that the operator was traced from; ``""`` for the root module.
        node: The name of its node.
        operators: Its ATen operator, then the operators fused behind it.
        integers: The integer type it is quantized to, as ``"int8"``; None if it stays in float.
        portable: Whether a part of it is known to be left to executorch's portable kernels.
        reason: The reason why it stays in float; ``""`` if it is quantized.
    """

    layer: str
    node: str
    operators: tuple[str, ...]
    integers: str | None
    portable: bool
    reason: str

    @property
    def becomes(self) -> str:
        """``"int8"``, ``"float"``, ``"float, portable"``."""
        return (self.integers or "float") + (", portable" if self.portable else "")
