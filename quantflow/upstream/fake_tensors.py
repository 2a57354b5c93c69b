"""Fake tensors: the shape, dtype and strides that a trace records for a value, without memory.

Names: ``torch._subclasses.FakeTensor`` and ``FakeTensorMode``; ``torch._guards.detect_fake_mode``;
``torch._dispatch.python.enable_python_dispatcher``, without which an operator on fake tensors replaces a dynamic size by the
size of the example. There is no fall-back.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

__all__ = ["FakeTensor", "FakeTensorMode", "detect_fake_mode", "enable_python_dispatcher"]
