"""The versions of torch, torchao and executorch for which the private names were checked.

Private functions are replaced only for these versions of torch and executorch. The environment variable
``QUANTFLOW_FAST_LOWERING=0`` switches all replacements off.
"""

from __future__ import annotations

import functools
import os
from importlib.metadata import version

CHECKED = {"torch": "2.14.1", "torchao": "0.18.0", "executorch": "1.5.1"}
SWITCH = "QUANTFLOW_FAST_LOWERING"
_REPLACED = ("torch", "executorch")  # the packages whose functions are replaced


@functools.cache
def supported() -> bool:
    """Whether the installed versions of the packages whose functions are replaced are those that were checked."""
    return all(_installed(name) == CHECKED[name] for name in _REPLACED)


def obstacle() -> str | None:
    """Return the reason why no private function may be replaced; None if there is none."""
    if os.environ.get(SWITCH) == "0":
        return f"{SWITCH}=0 switches it off"
    if supported():
        return None
    installed = ", ".join(f"{name} {_installed(name)}" for name in _REPLACED)
    checked = ", ".join(f"{name} {CHECKED[name]}" for name in _REPLACED)
    return f"installed are {installed}; checked were {checked}"


def _installed(name: str) -> str:
    return version(name).split("+")[0]
