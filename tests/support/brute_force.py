"""The best choice by brute force, for tests of the search."""

import numpy as np


def brute_force(table, max_bytes, max_ms):
    """The least noise over every combination."""
    totals = [np.zeros(1), np.full(1, float(table.size)), np.full(1, table.time)]
    for layer in table.layers:
        mine = [c for c in table.choices if c.layer == layer]
        columns = ([c.noise for c in mine], [c.size for c in mine], [c.time for c in mine])
        totals = [np.add.outer(t, np.array(c)).ravel() for t, c in zip(totals, columns, strict=True)]
    noise, size, time = totals
    allowed = (size <= (max_bytes or np.inf)) & (time <= (max_ms or np.inf))
    return noise[allowed].min() if allowed.any() else None
