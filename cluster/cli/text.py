"""Figures and tables as a terminal shows them."""

from __future__ import annotations

from collections.abc import Sequence

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def size(count: int) -> str:
    """A number of bytes in the unit that suits it."""
    value = float(count)
    unit = 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{count} B" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"


def pairs(rows: Sequence[tuple[str, str]]) -> str:
    """Names and values, one pair a line, the values below each other."""
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(f"{name:<{width}}{value}".rstrip() for name, value in rows)


def snippet(text: str, width: int) -> str:
    """The text's beginning on one line, without what would steer a terminal."""
    clean = "".join(character if character.isprintable() else " " for character in text)
    line = " ".join(clean.split())
    return line if len(line) <= width else f"{line[: width - 1].rstrip()}…"


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, most: Sequence[int], right: Sequence[int]
) -> str:
    """A table with one line per row.

    Args:
        head: names of the columns.
        rows: cells of any text.
        most: the columns' greatest widths.
        right: indices of the columns that are aligned to the right.
    """
    cells = [[snippet(cell, most[i]) for i, cell in enumerate(row)] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = []
    for row in cells:
        parts = [
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)
