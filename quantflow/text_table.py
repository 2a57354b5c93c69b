"""Tables as text, for people to read."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, figures: bool = False) -> list[str]:
    """A line for each row, its cells as wide as their columns.

    Args:
        rows: Cells; all rows have as many.
        figures: All columns but the first end at the right, as numbers are read.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = zip(others, widths[1:], strict=True)
        rest = (cell.rjust(width) if figures else cell.ljust(width) for cell, width in cells)
        lines.append("  ".join([first.ljust(widths[0]), *rest]).rstrip())
    return lines
