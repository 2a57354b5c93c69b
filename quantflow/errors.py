"""The one exception and the one warning of quantflow."""

from __future__ import annotations


def _message(stage: str, node: str | None, reason: str, remedy: str | None) -> str:
    where = f"[{stage}] {node}: " if node else f"[{stage}] "
    return f"{where}{reason}" + (f"\n  Remedy: {remedy}" if remedy else "")


class QuantflowError(RuntimeError):
    """A stage cannot go on.

    Attributes:
        stage: The stage in which the cause lies (``"export"``, ``"prepare"``, ``"calibrate"``, ...), which is not
            always the stage that noticed.
        node: The graph node, layer, file or argument at fault, or None where it is the whole.
        reason: What is wrong, in the user's own words where there are any.
        remedy: What to do about it.
    """

    def __init__(self, stage: str, reason: str, *, node: str | None = None, remedy: str | None = None) -> None:
        super().__init__(_message(stage, node, reason, remedy))
        self.stage, self.node, self.reason, self.remedy = stage, node, reason, remedy

    def __reduce__(self) -> tuple:
        return _rebuild, (self.stage, self.reason, self.node, self.remedy)


class QuantflowWarning(UserWarning):
    """A stage goes on, but not as asked; the message names the stage, the node and the remedy."""

    def __init__(self, stage: str, reason: str, *, node: str | None = None, remedy: str | None = None) -> None:
        super().__init__(_message(stage, node, reason, remedy))
        self.stage, self.node, self.reason, self.remedy = stage, node, reason, remedy


def _rebuild(stage: str, reason: str, node: str | None, remedy: str | None) -> QuantflowError:
    return QuantflowError(stage, reason, node=node, remedy=remedy)
