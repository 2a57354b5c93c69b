"""The mark of torchao's annotations that a quantizer has decided on a node.

Name: the field ``QuantizationAnnotation._annotated``. Stock quantizers skip nodes that have it set. There is no fall-back.
Checked with torch 2.14.1, torchao 0.18.0, executorch 1.5.1.
"""

from __future__ import annotations

from torchao.quantization.pt2e.quantizer import QuantizationAnnotation


def mark_annotated(annotation: QuantizationAnnotation) -> None:
    """Mark a ``torchao.quantization.pt2e.quantizer.QuantizationAnnotation`` as decided."""
    annotation._annotated = True
