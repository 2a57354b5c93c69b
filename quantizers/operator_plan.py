"""What becomes of one operator, in plain words."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class OperatorPlan:
    """One row of a plan.

    Attributes:
        layer: The module that the operator was traced from, ``""`` for the model itself.
        node: The name of its node.
        operators: What it computes, then what is fused behind it.
        integers: The integers it becomes, as ``"int8"``; None where it stays in float.
        portable: Whether some part of it is known to be left to executorch's own kernels.
        reason: Why it stays in float, ``""`` where it does not.
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
