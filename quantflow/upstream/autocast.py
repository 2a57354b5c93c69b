"""The functions that captured graphs call to enter and leave autocast.

Names: ``_enter_autocast`` and ``_exit_autocast`` of ``torch.amp.autocast_mode``. ``torch.export`` captures autocast as calls of
them, and compilers know them by identity; the public ``torch.autocast`` is a context manager. There is no fall-back.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

from torch.amp.autocast_mode import _enter_autocast as enter_autocast
from torch.amp.autocast_mode import _exit_autocast as exit_autocast

__all__ = ["enter_autocast", "exit_autocast"]
