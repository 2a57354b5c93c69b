"""Classification of the outcome of a case."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import quantflow as qf
from fuzzing.compare import AMPLIFIES, RIGHT, WRONG, Compared
from fuzzing.generate import runs
from fuzzing.isolate import Ended
from fuzzing.network import Network
from fuzzing.paths import walk

NOTHING, NAMED, UNNAMED, INVALID = "nothing to quantize", "error", "unnamed error", "invalid"
WARNED, FOREIGN, CRASH, HANG = "warned wrong", "foreign", "crash", "hang"
GOOD = (RIGHT, AMPLIFIES, NAMED, NOTHING)
VERDICTS = (*GOOD, UNNAMED, INVALID, WRONG, WARNED, FOREIGN, CRASH, HANG)

_NO_NAMES = {"the program", "the whole", "forward", "model", "graph"}
_SAYS_WRONG = re.compile(r"agrees with the graph to|has shape .* not|not proven")


@dataclass(frozen=True)
class Verdict:
    """The outcome of a case.

    Attributes:
        ending: One of :data:`VERDICTS`.
        reason: The failed check, the error or the signal.
        db: The SQNR of each check, dB.
        warned: The warnings of quantflow.
        text: The traceback, or the last output of the process.
    """

    ending: str
    reason: str = ""
    db: dict[str, float] | None = None
    warned: tuple[str, ...] = ()
    text: str = ""
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        """Whether the outcome is acceptable."""
        return self.ending in GOOD

    @property
    def kind(self) -> str:
        """Ending and reason without numbers and names: equal for cases with the same failure."""
        text = re.sub(r"\([^()]*\)|\d+(\.\d+)?|-?inf", "", self.reason)
        return f"{self.ending}: {text}"[:160]


def answer(case: tuple[Network, str]) -> dict[str, Any]:
    """Run a network through a path in this process; returns the data that :func:`judge` classifies."""
    network, path = case
    if not runs(network):
        return {"invalid": True}
    try:
        held = walk(network, path)
    except qf.QuantflowError as error:
        return {"stage": error.stage, "node": error.node, "reason": error.reason, "cause": repr(error.__cause__)[:500]}
    return {"laws": held.laws, "warned": held.warned}


def judge(ended: Ended[tuple[Network, str]]) -> Verdict:
    """Classify the outcome of a case."""
    if ended.kind in (CRASH, HANG):
        lines = ended.text.splitlines() or [""]
        return Verdict(ended.kind, lines[0][:200], text=ended.text, seconds=ended.seconds)
    if ended.kind == "raised":
        last = ended.text.strip().splitlines()[-1]
        return Verdict(FOREIGN, last[:300], text=ended.text, seconds=ended.seconds)
    found = ended.value
    if "invalid" in found:
        return Verdict(INVALID, "eager PyTorch does not run or train it", seconds=ended.seconds)
    if "reason" in found:
        reason = f"[{found['stage']}] {found['node'] or '-'}: {found['reason']}"
        return Verdict(_of_error(found, ended.task[0]), reason[:600], text=found["cause"], seconds=ended.seconds)
    laws: dict[str, Compared] = found["laws"]
    warned = tuple(found["warned"])
    db = {name: law.db for name, law in laws.items()}
    order = (RIGHT, AMPLIFIES, WRONG)
    worst, law = max(laws.items(), key=lambda item: order.index(item[1].verdict), default=("", Compared(RIGHT, 0.0)))
    reason = "" if law.verdict == RIGHT else f"{worst}: {law.db} dB ({law.where})"
    ending = law.verdict
    told = [w for w in warned if _SAYS_WRONG.search(w)]
    if told and ending != AMPLIFIES:
        ending, reason = WARNED, reason or told[0]
    return Verdict(ending, reason, db, warned, seconds=ended.seconds)


def _of_error(found: dict[str, Any], network: Network) -> str:
    if "quantized nothing" in found["reason"] or "nothing to train" in found["reason"]:
        return NOTHING
    node = (found["node"] or "").strip()
    if not node or node in _NO_NAMES:
        return UNNAMED
    return NAMED
