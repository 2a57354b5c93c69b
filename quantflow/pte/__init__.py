"""What a ``.pte`` says of itself, read in plain Python: neither torch nor the runtime sees bytes that may come from anyone."""

from quantflow.pte.contents import SIGNATURE_METHOD, Contents, Method, TensorType, read
from quantflow.pte.header import check_header

__all__ = ["SIGNATURE_METHOD", "Contents", "Method", "TensorType", "check_header", "read"]
