"""A table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def table(titles: Sequence[str], rows: Sequence[Sequence[str]], last_apart: bool = False) -> str:
    """Columns of text, the first to the left, the others to the right.

    Args:
        last_apart: a line above the last row, too.
    """
    cells = [list(titles), *map(list, rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(titles))]
    rule = "  ".join("-" * width for width in widths)
    lines = []
    for i, line in enumerate(cells):
        if i == 1 or (last_apart and i == len(cells) - 1):
            lines.append(rule)
        lines.append("  ".join(t.rjust(w) if place else t.ljust(w) for place, (t, w) in enumerate(zip(line, widths))))
    return "\n".join(lines)
