"""The operators of executorch's edge dialect.

Names: ``executorch.exir.dialects._ops.ops`` and ``executorch.exir.dialects.edge._ops.EdgeOpOverload``. Passes that run on edge
graphs compare and create nodes with them. There is no fall-back: the delegate ``"xnnpack"`` needs them.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1. The import of this module imports executorch.
"""

from __future__ import annotations

from executorch.exir.dialects._ops import ops
from executorch.exir.dialects.edge._ops import EdgeOpOverload

__all__ = ["EdgeOpOverload", "ops"]
