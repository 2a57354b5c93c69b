"""Metrics are what their formulas say."""

import math

import pytest
import torch

from quantflow.metrics import OutputComparison, PairedDrop, right, signal_to_noise


def test_metrics_are_what_their_formulas_say():
    reference, approximation = torch.randn(40, 7), torch.randn(40, 7)
    whole, parts = OutputComparison(), OutputComparison()
    whole.add(reference, approximation)
    for a, b in zip(reference.split(9), approximation.split(9), strict=True):
        parts.add(a, b)
    noise = (reference - approximation).square().sum()
    assert whole.sqnr_db == pytest.approx(float(10 * torch.log10(reference.square().sum() / noise)), abs=1e-4)
    assert whole.sqnr_db == pytest.approx(signal_to_noise(reference, approximation))
    assert parts.sqnr_db == pytest.approx(whole.sqnr_db)
    same = int((reference.argmax(1) == approximation.argmax(1)).sum())
    assert parts.agreement == whole.agreement == same / 40
    equal = torch.tensor([[1.0, float("inf"), float("nan")]])
    assert signal_to_noise(equal, equal) == math.inf
    assert math.isnan(signal_to_noise(torch.ones(2), equal[0, [0, 2]]))
    assert right(torch.randn(3, 4, 2, 2), torch.zeros(3, 2, 2, dtype=torch.long)).shape == (3,)
    for target in (torch.zeros(3), torch.zeros(3, 1, dtype=torch.long)):  # no classes
        assert right(torch.randn(3, 4), target) is None


def test_the_drop_is_paired():
    right_, wrong = torch.ones(200), torch.ones(200)
    wrong[:7] = 0
    drop = PairedDrop()
    for a, b in zip(right_.split(30), wrong.split(30), strict=True):
        drop.add(a, b)
    assert drop.points == pytest.approx(3.5)
    # Seven ones among zeros: the standard error of a share.
    assert drop.interval == pytest.approx(196 * (0.035 * 0.965 / 199) ** 0.5, abs=1e-3)
    same = PairedDrop()
    same.add(wrong, wrong)
    assert (same.points, same.interval) == (0.0, 0.0)
    # Errors of equal number on other examples drop nothing, and are no certainty.
    other = PairedDrop()
    other.add(wrong, wrong.flip(0))
    assert other.points == 0.0
    assert other.interval > 0
