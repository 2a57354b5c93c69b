"""The functions that captured graphs call to enter and leave autocast.

Names: ``torch.amp._enter_autocast`` and ``_exit_autocast``. ``torch.export`` captures autocast as calls of them, and compilers
know them by identity; the public ``torch.autocast`` is a context manager. There is no fall-back.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

import torch

enter_autocast = torch.amp._enter_autocast
exit_autocast = torch.amp._exit_autocast
