"""The exception and the warning that quantflow raises."""

from __future__ import annotations


def _message(stage: str, node: str | None, reason: str, remedy: str | None) -> str:
    where = f"[{stage}] {node}: " if node else f"[{stage}] "
    return f"{where}{reason}" + (f"\n  Remedy: {remedy}" if remedy else "")


class QuantflowError(RuntimeError):
    """A stage cannot go on; the message names the stage, the place, the reason and the remedy.

    The arguments are attributes of the same names.

    Args:
        stage: The stage in which the cause lies (``"export"``, ``"prepare"``, ``"calibrate"``, ...). It is not always the
            stage that noticed the cause.
        reason: What is wrong.
        node: The graph node, layer, file or argument at fault; None where the whole is at fault.
        remedy: What to do about it; None where nothing is known.

    Example:
        >>> import torch
        >>> import quantflow as qf
        >>> try:
        ...     qf.convert(torch.nn.Linear(4, 2))
        ... except qf.QuantflowError as error:
        ...     print(error.stage, "-", error.reason)
        convert - the graph was not prepared
    """

    def __init__(self, stage: str, reason: str, *, node: str | None = None, remedy: str | None = None) -> None:
        super().__init__(_message(stage, node, reason, remedy))
        self.stage, self.node, self.reason, self.remedy = stage, node, reason, remedy

    def __reduce__(self) -> tuple:
        return _rebuild, (self.stage, self.reason, self.node, self.remedy)


class QuantflowWarning(UserWarning):
    """A stage goes on, but not as asked; the message names the stage, the place, the reason and the remedy.

    The arguments are attributes of the same names.

    Args:
        stage: The stage in which the cause lies (``"plan"``, ``"edge"``, ``"train"``, ...).
        reason: What was not done as asked.
        node: The graph node, layer, file or argument at fault; None where the whole is at fault.
        remedy: What to do about it; None where nothing is known.

    Example:
        Make every warning of quantflow an error:

        >>> import warnings
        >>> import quantflow as qf
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", qf.QuantflowWarning)
        ...     try:
        ...         warnings.warn(qf.QuantflowWarning("edge", "left to portable kernels", node="conv"))
        ...     except qf.QuantflowWarning as warning:
        ...         print(warning)
        [edge] conv: left to portable kernels
    """

    def __init__(self, stage: str, reason: str, *, node: str | None = None, remedy: str | None = None) -> None:
        super().__init__(_message(stage, node, reason, remedy))
        self.stage, self.node, self.reason, self.remedy = stage, node, reason, remedy


def _rebuild(stage: str, reason: str, node: str | None, remedy: str | None) -> QuantflowError:
    return QuantflowError(stage, reason, node=node, remedy=remedy)
