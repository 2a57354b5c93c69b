"""Batches are cut for stages of one batch size: only what holds examples, and what can not be cut is told."""

import pytest
import torch
from torch import nn

import quantflow as qf


def verify(stages, data, **options):
    return qf.verify(stages, data, **{"progress": False, "latency_runs": 0, **options})


class Masked(nn.Module):
    """Rows that are weighed by a mask which all examples share, and moved by a number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(30, 3)

    def forward(self, x, mask, shift):
        return self.linear((mask[:, 0, None] * x + shift).flatten(1))


@pytest.mark.parametrize("rows", [4, 5])  # 5: the mask has as many rows as a call takes
def test_only_what_holds_examples_is_cut(rows):
    model = Masked().eval()
    mask, shift = torch.rand(5, 5).tril(), torch.tensor(0.5)
    data = [((torch.randn(n, 5, 6), mask, shift), torch.arange(n) % 3) for n in (11, 5, 2)]
    example = (data[0][0][0][:rows], mask, shift)
    exported = qf.export(model, example)
    program = exported.to_core_aten().to_edge("xnnpack").to_executorch()
    batch = torch.export.Dim("batch", min=1, max=6)
    bounded = qf.export(model, example, dynamic_shapes=({0: batch}, None, None)).to_core_aten().to_edge()
    stages = {"eager": model, "exported": exported, "pte": program, "bounded": bounded.to_executorch()}
    found = verify(stages, data, latency_runs=2)
    assert found.examples == 18
    assert all(s.output.sqnr_db > 60 for s in found.stages[1:])
    assert [s.latency.rows for s in found.stages] == [rows, rows, rows, 1]


def test_what_can_not_be_cut_is_told():
    x, y = torch.randn(6, 4), torch.randn(4, 4)

    class Two(nn.Module):
        def forward(self, x, y):
            return x + y, x * 2

    fixed = qf.export(Two(), (x[:2], y[:2]))
    for data in ([((x, y), None)], [((x, y[:3]), None)]):
        with pytest.raises(qf.QuantflowError, match=r"x, y: can't tell its examples apart(.|\n)*give batches"):
            verify({"fixed": fixed}, data)
    features = qf.export(nn.Linear(4, 4), (x[0],))
    with pytest.raises(qf.QuantflowError, match="examples or features"):
        verify({"one row": features}, [torch.randn(8)])
    square = torch.export.Dim("square", min=1, max=4)
    tied = qf.export(nn.ReLU(), (torch.rand(3, 3),), dynamic_shapes=({0: square, 1: square},))
    with pytest.raises(qf.QuantflowError, match="another dimension as well"):
        verify({"tied": tied}, [torch.randn(6, 6)])


def test_inputs_that_all_examples_share_are_sampled_and_judged():
    model = Masked().eval()
    mask, shift = torch.rand(5, 5).tril(), torch.tensor([0.5])
    data = [((x, mask, shift), model(x, mask, shift).argmax(1)) for x in (torch.randn(7, 5, 6), torch.randn(3, 5, 6))]
    result = qf.quantize(model, (data[0][0][0][:2], mask, shift), data, max_drop=0.9, progress=False)
    assert result.report.accuracy_control.holds
    assert len(verify({"eager": model, "pte": result.program}, data).stages) == 2
