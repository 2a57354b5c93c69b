"""The function that captured graphs call to set the gradient mode.

Name: ``torch._C._set_grad_enabled``. ``torch.export`` captures ``torch.no_grad`` as a call of it, and compilers know it by
identity; the public ``torch.set_grad_enabled`` is a context manager. There is no fall-back.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

import torch

set_grad_enabled = torch._C._set_grad_enabled
