"""A latency says how it was taken."""

from quantflow.latency import measure


def test_latency_says_how_it_was_taken():
    calls = []
    found = measure(lambda: calls.append(1), rows=3, threads=1, runs=8, warm_up=2)
    assert len(calls) == 10
    assert (found.runs, found.warm_up, found.rows, found.threads) == (8, 2, 3, 1)
    assert 0 <= found.low_ms <= found.median_ms <= found.high_ms
