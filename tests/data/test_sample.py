"""A sample of the data: no larger than asked, and it goes on from its state."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import quantflow as qf
from quantflow.signature.signature import DynamicDim, Input, Signature


def test_a_sample_goes_on_from_its_state():
    graph = qf.export(nn.Linear(3, 2), (torch.randn(1, 3),), dynamic_batch=True).module()
    signature = Signature.of_graph(graph)
    batches = [torch.randn(5, 3) for _ in range(8)]
    whole, before, after = qf.Sample(7), qf.Sample(7), qf.Sample()
    for i, x in enumerate(batches):
        whole.add([x], signature)
        if i == 4:
            after.load_state_dict(before.state_dict())
        (before if i < 4 else after).add([x], signature)
    assert all(torch.equal(a, b) for (a,), (b,) in zip(whole.batches(), after.batches(), strict=True))
    with pytest.raises(qf.QuantflowError, match="not the state of a sample"):
        after.load_state_dict({"weight": torch.zeros(3)})


def test_a_sample_keeps_what_a_loader_writes_over():
    signature = Signature((Input("x", "float32", (2, 3)),))
    dynamic = Signature((Input("x", "float32", (DynamicDim("batch", 1, None), 3)), Input("table", "float32", (4,))))
    buffer, table, whole, cut = torch.zeros(2, 3), torch.zeros(4), qf.Sample(8), qf.Sample(8)
    for step in range(3):
        buffer.fill_(step)
        table.fill_(step // 2)
        whole.add([buffer], signature)
        cut.add([buffer, table], dynamic)
    assert sorted(x[0, 0].item() for (x,) in whole.batches()) == [0, 1, 2]
    found = {table[0].item(): sorted(x[:, 0].tolist()) for x, table in cut.batches()}
    assert found == {0: [0, 0, 1, 1], 1: [2, 2]}  # examples that share an input form batches


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 40))
def test_a_sample_is_of_the_data_and_no_larger_than_asked(total, batch, examples):
    x = torch.arange(total, dtype=torch.float32).reshape(total, 1)
    sample = qf.Sample(examples)
    for part in x.split(batch):
        sample.add((part,), Signature((Input("x", "float32", (DynamicDim("batch", 1, None), 1)),)))
    values = torch.cat([b[0] for b in sample.batches()]).flatten().tolist()
    assert len(values) == len(set(values)) == min(total, examples)
    assert all(len(b[0]) <= 8 for b in sample.batches())
