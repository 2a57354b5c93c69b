"""The solver: the choices with the least noise under a limit, an exact multiple-choice knapsack."""

from __future__ import annotations

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from quantflow.errors import QuantflowError
from quantflow.mixed_precision.choices import Choice, Table


def solve(table: Table, *, max_bytes: float | None = None, max_ms: float | None = None) -> tuple[Choice, ...]:
    """One choice for each layer of ``table`` with the least total noise, by integer programming.

    Args:
        table: The choices and what they cost.
        max_bytes: The largest size of the program, bytes.
        max_ms: The largest latency of a call, milliseconds.

    Raises:
        QuantflowError: at stage ``"search"``, if no choice meets the limits. The message gives the least that can be reached.
    """
    choices = table.choices
    one_each = np.array([[float(c.layer == layer) for c in choices] for layer in table.layers])
    rules = [LinearConstraint(one_each, 1, 1)]
    limits = ((max_bytes, table.size, [c.size for c in choices]), (max_ms, table.time, [c.time for c in choices]))
    for limit, base, costs in limits:
        if limit is not None:
            rules.append(LinearConstraint(np.array([costs], dtype=float), -np.inf, limit - base))
    noise = np.array([c.noise for c in choices])
    scale = noise.max() or 1.0  # the solver's tolerances are absolute
    binary = {"integrality": np.ones(len(choices)), "bounds": Bounds(0, 1)}
    found = milp(noise / scale, constraints=rules, options={"mip_rel_gap": 0.0}, **binary)
    if found.x is None:
        reach = [base + sum(min(c for c, row in zip(costs, layer, strict=True) if row) for layer in one_each)
                 for _, base, costs in limits]  # fmt: skip
        reason = f"no choice of precisions keeps the limit; the least are {reach[0]:,.0f} bytes and {reach[1]:.3f} ms"
        raise QuantflowError("search", reason, node="limit", remedy="allow more, or a smaller model")
    return tuple(choice for choice, taken in zip(choices, found.x, strict=True) if taken > 0.5)


def frontier(table: Table, points: int = 20) -> tuple[tuple[Choice, ...], ...]:
    """The choices of least noise for sizes between the smallest program and that of least noise, without duplicates."""
    sizes = [[c.size for c in table.choices if c.layer == layer] for layer in table.layers]
    least = table.size + sum(map(min, sizes))
    most = table.total(solve(table))[1]
    limits = np.linspace(least, max(least, most), points)
    return tuple(dict.fromkeys(solve(table, max_bytes=float(np.ceil(limit))) for limit in limits))
