"""Formatting of text tables."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]], *, figures: bool = False) -> list[str]:
    """The rows as lines of text, with cells padded to the width of their column.

    Args:
        rows: Cells; all rows have the same number.
        figures: Right-align all columns except the first, for numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = zip(others, widths[1:], strict=True)
        rest = (cell.rjust(width) if figures else cell.ljust(width) for cell, width in cells)
        lines.append("  ".join([first.ljust(widths[0]), *rest]).rstrip())
    return lines
