"""The operators ``torch.ops.quantized_decomposed``, which converted graphs call.

Name: ``torch.ao.quantization.fx._decomposed``, whose import registers the operators. There is no fall-back: a graph can't be
converted without them.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from torch.ao.quantization.fx import _decomposed  # noqa: F401
