"""The versions of torch and executorch for which the private names were checked."""

from __future__ import annotations

import functools
from importlib.metadata import version

_CHECKED = {"torch": "2.14.1", "executorch": "1.5.1"}


@functools.cache
def supported() -> bool:
    """Whether the installed versions are those that were checked."""
    return all(version(name).split("+")[0] == wanted for name, wanted in _CHECKED.items())
