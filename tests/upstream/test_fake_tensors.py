import torch
from torch import nn

from quantflow.upstream.fake_tensors import FakeTensor, FakeTensorMode, detect_fake_mode, enable_python_dispatcher


def test_a_mode_makes_fake_tensors():
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        x = torch.empty(2, 3)
        assert (x @ torch.zeros(3, 1)).shape == (2, 1)
    assert isinstance(x, FakeTensor)
    assert x.fake_mode is mode
    assert x.constant is None
    assert isinstance(mode.from_tensor(torch.zeros(4), static_shapes=True), FakeTensor)


def test_a_trace_records_fake_tensors_of_one_mode():
    program = torch.export.export(nn.ReLU(), (torch.zeros(2),))
    values = [node.meta.get("val") for node in program.graph.nodes]
    assert isinstance(values[0], FakeTensor)
    assert detect_fake_mode(values) is values[0].fake_mode
    assert detect_fake_mode([None, torch.zeros(1)]) is None


def test_a_dynamic_size_stays_dynamic():
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(nn.ReLU(), (torch.zeros(3, 4),), dynamic_shapes=({0: batch},))
    x = next(iter(program.graph.nodes)).meta["val"]
    with x.fake_mode, enable_python_dispatcher():
        y = torch.ops.aten.adaptive_avg_pool2d.default(torch.ops.aten.reshape.default(x, [x.shape[0], 1, 2, 2]), [1, 1])
    assert isinstance(y.shape[0], torch.SymInt)
