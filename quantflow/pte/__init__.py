"""A reader of ``.pte`` files in plain Python, so that neither torch nor the runtime reads untrusted bytes."""

from quantflow.pte.contents import SIGNATURE_METHOD, Contents, Method, TensorType, read
from quantflow.pte.header import check_header

__all__ = ["SIGNATURE_METHOD", "Contents", "Method", "TensorType", "check_header", "read"]
