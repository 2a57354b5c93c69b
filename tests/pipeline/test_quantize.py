"""The whole flow in one call, and what it refuses or warns of."""

import pytest
import torch
from networks import ConvNet, randomize_statistics, sqnr
from torch import nn

import quantflow as qf
from quantizers import INT8, XNNPACKQuantizer

X = torch.randn(2, 3, 16, 16)


def test_quantize_is_all_verbs_in_one():
    model = randomize_statistics(ConvNet()).eval()
    result = qf.quantize(model, (X[:1],), [torch.randn(5, 3, 16, 16), torch.randn(3, 3, 16, 16)], progress=False)
    assert result.report.delegated_fraction == 1.0
    assert "int8" in str(result.report)
    assert sqnr(model(X[:1]).detach(), result.program(X[:1])) > 15
    assert set(result.report.seconds) == {"export", "prepare", "calibrate", "recover", "convert", "lower"}
    with pytest.raises(qf.QuantflowError, match="abacus"):
        qf.quantize(model, (X[:1],), [X], delegate="abacus")
    with pytest.raises(qf.QuantflowError, match="no way to recover"):
        qf.quantize(model, (X[:1],), [X], recover="everything")


def test_quantize_warns_of_what_stays_outside():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            return self.linear(torch.cumsum(x, 1))

    with pytest.warns(qf.QuantflowWarning, match="cumsum"):
        qf.quantize(
            Running(), (torch.randn(1, 8),), [torch.randn(4, 8)], quantizer=XNNPACKQuantizer(INT8), progress=False
        )


def test_a_batch_size_for_the_program_is_not_a_bool():
    with pytest.raises(qf.QuantflowError, match="8 is not a bool"):
        qf.quantize(nn.Linear(4, 4), (torch.randn(2, 4),), [torch.randn(2, 4)], dynamic_batch=8, progress=False)


class Pooled(nn.Module):
    """Images of any size to classes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Encoder(nn.Module):
    """Sentences of any length, with a mask, to vectors."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(32, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids, mask):
        x = self.norm(self.embedding(ids))
        x = x + self.down(nn.functional.gelu(self.up(x)))
        mask = mask[..., None].float()
        return (x * mask).sum(1) / mask.sum(1)


def test_images_of_any_size_calibrate_and_run():
    torch.manual_seed(0)
    model = randomize_statistics(Pooled()).eval()
    height, width = torch.export.Dim("height", min=8, max=48), torch.export.Dim("width", min=8, max=40)
    data = [torch.randn(4, 3, 16, 24), torch.randn(2, 3, 32, 16)]
    shapes = ({2: 2 * height, 3: 2 * width},)
    result = qf.quantize(model, (torch.randn(1, 3, 32, 32),), data, dynamic_shapes=shapes, progress=False)
    assert result.program.delegation.calls == 1
    for size in ((16, 16), (32, 24), (96, 80)):
        x = torch.randn(1, 3, *size)
        assert sqnr(model(x).detach(), result.program(x)) > 20


@pytest.mark.filterwarnings("ignore::quantflow.QuantflowWarning")
def test_sentences_of_any_length_calibrate_and_run():
    torch.manual_seed(0)
    model, length = Encoder().eval(), torch.export.Dim("length", min=2, max=16)

    def sentences(count, tokens):
        return torch.randint(32, (count, tokens)), (torch.arange(tokens) < max(1, tokens - 2)).expand(
            count, tokens
        ).long()

    data = [sentences(4, 8), sentences(3, 5)]
    shapes = {"ids": {1: length}, "mask": {1: length}}
    result = qf.quantize(model, sentences(1, 8), data, dynamic_shapes=shapes, inputs=lambda b: b, progress=False)
    for tokens in (2, 8, 16):
        ids, mask = sentences(1, tokens)
        assert sqnr(model(ids, mask).detach(), result.program(ids, mask)) > 20
