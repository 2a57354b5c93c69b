"""Extraction of the failed operator and the failed check from the log of the runtime."""

from __future__ import annotations

import re

# "[method.cpp:1483] KernelCall failed at instruction 0:1 in operator aten::constant_pad_nd.out: 0x12"
_FAILED_KERNEL = re.compile(r"KernelCall failed at instruction \S+ in operator (\w+::[\w.]+)")
# "[operator_registry.cpp:250] kernel 'aten::_cdist_forward.out' not found."
_MISSING_KERNEL = re.compile(r"kernel '([\w:.]+)' not found|Missing operator: \[\d+\] ([\w:.]+)")
_CHECK = re.compile(r"\[\w+\.(?:cpp|h):\d+\] (Check failed .*|In function .*)")
_DELEGATE = re.compile(r"\[XNN\w*\.(?:cpp|h):\d+\] (.*)|(failed to (?:create|define|reshape|setup) .*)")
_LONGEST = 200  # the longest message shown, in characters


def failed_operators(log: str) -> tuple[str, ...]:
    """Return the operators whose kernel is missing or failed, such as ``aten::cumsum.out``, each once."""
    found = [next(filter(None, match.groups())) for match in _MISSING_KERNEL.finditer(log)]
    return tuple(dict.fromkeys([*found, *_FAILED_KERNEL.findall(log)]))


def explanation(log: str) -> str:
    """Return the most specific line of ``log``, the check that a delegate or a kernel failed; ``""`` if there is none."""
    for pattern in (_DELEGATE, _CHECK):
        if match := pattern.search(log):
            return next(filter(None, match.groups())).strip()[:_LONGEST]
    return ""
