"""Tables of figures."""

from __future__ import annotations

from collections.abc import Sequence

UNKNOWN = "-"


def print_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Right-aligned, without the columns that are UNKNOWN in every row. A name may have several lines."""
    height = max(name.count("\n") for name in names)
    columns = [
        [*("\n" * (height - name.count("\n")) + name).split("\n"), *cells]
        for name, *cells in zip(names, *rows, strict=True)
        if any(cell != UNKNOWN for cell in cells)
    ]
    widths = [max(map(len, column)) for column in columns]
    for line in zip(*columns, strict=True):
        print(" ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
