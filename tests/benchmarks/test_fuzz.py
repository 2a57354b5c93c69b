"""A slice of the differential fuzzer: fixed seeds, by every path."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from fuzzing.generate import generate
from fuzzing.isolate import Ended
from fuzzing.paths import PATHS
from fuzzing.verdict import answer, judge

pytestmark = pytest.mark.slow

SEEDS = range(24)


def verdict_of(network, path):
    return judge(Ended((network, path), "returned", answer((network, path))))


@pytest.mark.parametrize("seed", SEEDS)
def test_ends_right_or_in_a_named_error(seed):
    verdict = verdict_of(generate(seed), list(PATHS)[seed % len(PATHS)])
    assert verdict.good, f"{verdict.ending}: {verdict.reason} {verdict.db} {verdict.warned}"
