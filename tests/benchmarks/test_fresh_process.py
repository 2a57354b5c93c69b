"""A fresh process answers or fails as its function does, and its memory is measured."""

import os
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from fresh_process import in_fresh_process, peak_growth


def test_a_fresh_process_answers_or_fails_as_its_function_does():
    assert in_fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        in_fresh_process(int, "no number")


def test_peak_growth_sees_what_is_freed_again():
    size = 64 * 2**20
    assert size <= peak_growth(lambda: bytearray(b"1" * (size // 2)) * 2) < 4 * size
    assert peak_growth(lambda: None) < size / 16
