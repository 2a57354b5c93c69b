"""Comparison of the outputs of two networks: equal, different, or within the effect of rounding errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fuzzing.rounding import Outputs
from quantflow.metrics import signal_to_noise

RIGHT, AMPLIFIES, WRONG = "right", "amplifies", "wrong"
EXACT = 999.0  # dB, for equal outputs; its negative for outputs that can't be compared


@dataclass(frozen=True)
class Compared:
    """The agreement of two networks.

    Attributes:
        verdict: ``right``, ``amplifies`` (rounding errors alone have this effect) or ``wrong``.
        db: SQNR of the worst output; for integers and booleans -10·log10 of the share that differs.
        where: The call and the index of the worst output.
    """

    verdict: str
    db: float
    where: str = ""


def compare(
    expected: Outputs,
    found: Outputs,
    least: float,
    noise: Callable[[], list[Outputs]],
    margin: float = 4.0,
    tiny: float = 1e-6,
    integers: bool = True,
) -> Compared:
    """Compare every output of every call.

    Args:
        expected: The outputs of the reference.
        found: The outputs of the other network.
        least: The required SQNR, dB.
        noise: Draws of the reference with injected rounding errors; computed only if an output is below ``least``.
        margin: The largest ratio, in amplitude, of a difference to the effect of injected errors that counts as rounding.
        integers: Whether integer and boolean outputs are compared too: they must be equal.
        tiny: Smaller differences count as none: after cancellation only rounding is left.
    """
    worst = Compared(RIGHT, EXACT)
    draws: list[Outputs] | None = None
    for call, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        if len(ours) != len(theirs):
            return Compared(WRONG, -EXACT, f"call {call}: {len(ours)} outputs, not {len(theirs)}")
        for index, (mine, reference) in enumerate(zip(ours, theirs, strict=True)):
            where = f"call {call}, output {index}"
            if mine.shape != reference.shape or mine.dtype != reference.dtype:
                text = f"{mine.dtype}{list(mine.shape)}, not {reference.dtype}{list(reference.shape)}"
                return Compared(WRONG, -EXACT, f"{where}: {text}")
            if not integers and not reference.is_floating_point():
                continue
            db = nearness(reference, mine, tiny)
            verdict = RIGHT
            if not db >= (least if reference.is_floating_point() else EXACT):
                draws = noise() if draws is None else draws
                far = min(nearness(reference, draw[call][index], tiny) for draw in draws)
                verdict = AMPLIFIES if db >= far - 20 * math.log10(margin) else WRONG
            order = [RIGHT, AMPLIFIES, WRONG]
            if (order.index(verdict), -db) > (order.index(worst.verdict), -worst.db):
                worst = Compared(verdict, round(db, 1), where)
    return worst


def nearness(reference: torch.Tensor, found: torch.Tensor, tiny: float) -> float:
    """The SQNR, dB; for integers and booleans -10·log10 of the share that differs."""
    if not reference.is_floating_point():
        share = float((reference != found).double().mean())
        return -10 * math.log10(share) if share else EXACT
    if torch.allclose(found, reference, rtol=0.0, atol=tiny, equal_nan=True):
        return EXACT
    db = signal_to_noise(reference, found)
    return -EXACT if math.isnan(db) else max(-EXACT, min(db, EXACT))
