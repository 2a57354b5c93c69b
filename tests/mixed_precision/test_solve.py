"""The solution is that of brute force on its table, and nothing lies above the frontier."""

import itertools

import numpy as np
import pytest
from brute_force import brute_force

import quantflow as qf
from quantflow.mixed_precision.choices import Choice, Table
from quantflow.mixed_precision.solve import frontier, solve


def random_table(seed, sites):
    random = np.random.default_rng(seed)
    choices = []
    for site in range(sites):
        size, noise = random.integers(1000, 50000), 10.0 ** random.uniform(-6, -2)
        for name, share, factor in (("float", 3.0, 0.0), ("int8", 0.0, 1.0), ("4-bit weights", -0.5, 200.0)):
            factor *= random.uniform(0.5, 2)
            choices.append(Choice(f"l{site}", name, noise * factor, int(share * size), share * random.uniform(0.1, 1)))
    return Table(tuple(choices), 400_000, 12.0)


@pytest.mark.parametrize("seed", range(6))
def test_the_solution_is_that_of_brute_force_on_twelve_layers(seed):
    table = random_table(seed, 12)
    sizes = [c.size for c in table.choices]
    low, high = table.size + sum(s for s in sizes if s < 0), table.size + sum(s for s in sizes if s > 0)
    for max_bytes, max_ms in ((low * 0.7 + high * 0.3, None), (high * 0.95, 14.0), (None, 11.5), (table.size, None)):
        found = solve(table, max_bytes=max_bytes, max_ms=max_ms)
        noise, size, time = table.total(found)
        assert [c.layer for c in found] == list(table.layers)
        assert size <= (max_bytes or np.inf)
        assert time <= (max_ms or np.inf) + 1e-9
        assert noise <= brute_force(table, max_bytes, max_ms) * 1.01


def test_the_frontier_rises_and_nothing_lies_above_it():
    table = random_table(7, 6)
    points = [table.total(chosen) for chosen in frontier(table)]
    assert len(points) > 3
    for (more, small, _), (less, large, _) in itertools.pairwise(points):
        assert small < large
        assert more > less
    for noise, size, _ in points:
        assert brute_force(table, size, None) == pytest.approx(noise)


def test_a_limit_out_of_reach_is_told():
    with pytest.raises(qf.QuantflowError, match="the least are"):
        solve(random_table(0, 4), max_bytes=10)
