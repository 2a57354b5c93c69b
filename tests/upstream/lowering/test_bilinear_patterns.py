import inspect

from executorch.backends.xnnpack._passes import convert_to_upsample_bilinear2d
from executorch.backends.xnnpack.partition.graphs import bilinear_2d

from quantflow.upstream.lowering.bilinear_patterns import no_bilinear_patterns
from quantflow.upstream.replaced import exclusively


def test_there_are_no_patterns_within():
    stock = bilinear_2d.get_graphs_dict
    with exclusively(), no_bilinear_patterns():
        assert bilinear_2d.get_graphs_dict() == {}
    assert bilinear_2d.get_graphs_dict is stock


def test_the_pass_reads_the_patterns_from_there():
    assert convert_to_upsample_bilinear2d.bilinear_2d is bilinear_2d
    assert "bilinear_2d.get_graphs_dict()" in inspect.getsource(convert_to_upsample_bilinear2d)
