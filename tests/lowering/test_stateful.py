"""What a network writes in place: three calls in a row are eager's, converted and on the runtime, and who looks leaves it."""

import copy

import pytest
from stateful import CALLS, MAKE, assert_same_state, called, lower, prepare, state_of, worst

import quantflow as qf
from quantflow.ptq import adaround, correct_bias
from quantizers import DYNAMIC_INT8, INT8, XNNPACKQuantizer

pytestmark = pytest.mark.slow

NETWORKS = pytest.mark.parametrize("name", MAKE)


@pytest.mark.parametrize(
    ("name", "delegate"),
    [
        ("average from 3", "xnnpack"),
        ("weights", "xnnpack"),
        ("several", "xnnpack"),
        ("cache by index", "xnnpack"),
        ("cache by select", None),
    ],
)
def test_float(name, delegate):
    model = MAKE[name]().eval()
    program = lower(copy.deepcopy(model), delegate)
    assert worst(called(model), called(program)) > 60


@pytest.mark.parametrize(
    ("name", "scheme"),
    [*((name, INT8) for name in MAKE), ("several", DYNAMIC_INT8), ("cache by index", DYNAMIC_INT8)],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.plan.")  # of what runs in float between integers
def test_quantized(name, scheme):
    model = MAKE[name]().eval()
    prepared = qf.calibrate(prepare(model, scheme), CALLS, progress=False)
    assert_same_state(prepared, state_of(model, model))
    converted = qf.convert(prepared)
    program = lower(converted)
    expected, found = called(model), called(converted)
    assert worst(expected, found) > 25
    assert worst(found, called(program)) > 35


@NETWORKS
@pytest.mark.filterwarnings("ignore:.plan.")
def test_training(name):
    """In inference, a graph prepared for training, with rounding off, writes what the eager network writes."""
    model = MAKE[name]().eval()
    prepared = qf.calibrate(prepare(model, INT8, qat=True), CALLS, progress=False)
    assert_same_state(prepared, state_of(model, model))
    exact, converted = copy.deepcopy(prepared), qf.convert(prepared)
    for module in exact.modules():
        if isinstance(module, qf.FakeQuantize):
            module.enable_fake_quant(False)
    expected = called(model)
    assert worst(expected, called(exact)) > 80
    assert worst(called(prepared), called(converted)) > 35


@pytest.mark.parametrize("name", ["average, read first", "several", "cache by slice", "cache by index"])
@pytest.mark.filterwarnings("ignore::quantflow.QuantflowWarning")
def test_what_looks_at_a_network_leaves_its_state(name):
    model = MAKE[name]().eval()
    graph = qf.export(model, (CALLS[0],)).module()
    before, sample = state_of(model, model), qf.Sample()
    prepared = qf.prepare(graph, XNNPACKQuantizer())
    qf.calibrate(prepared, CALLS, sample=sample, progress=False)
    converted = qf.convert(prepared)
    qf.recover(prepared, sample, progress=False)
    qf.sensitivity(prepared, sample, progress=False)
    qf.diagnose(graph, converted, CALLS, progress=False)
    adaround(prepared, sample, iterations=2, progress=False)
    correct_bias(prepared, sample)
    stages = {"float": model, "graph": graph, "prepared": prepared, "converted": converted}
    figures = qf.verify(stages, CALLS, latency_runs=0, progress=False)
    assert min(output.sqnr_db for stage in figures.stages[1:] for output in stage.outputs) > 20
    for network in (model, graph, prepared, converted):
        assert_same_state(network, before)
