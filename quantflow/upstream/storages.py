"""The identity of a tensor's memory.

Name: ``UntypedStorage._cdata``, the address of the storage object. The public ``data_ptr()`` is zero for tensors that are
empty or on the meta device. There is no fall-back.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

from torch import Tensor


def storage_id(tensor: Tensor) -> int:
    """Return a number that is equal for tensors over one storage, as long as one of them lives."""
    return tensor.untyped_storage()._cdata
