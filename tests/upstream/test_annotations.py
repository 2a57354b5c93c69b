from torchao.quantization.pt2e.quantizer import QuantizationAnnotation

from quantflow.upstream.annotations import mark_annotated


def test_the_mark_is_the_field_that_torchao_declares():
    annotation = QuantizationAnnotation()
    assert annotation == QuantizationAnnotation(_annotated=False)
    mark_annotated(annotation)
    assert annotation == QuantizationAnnotation(_annotated=True)
