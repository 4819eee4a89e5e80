"""Figures as SVG, light or dark as the reader's screen is."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from dyvte.report.style import DARK


def to_svg(figure: Figure) -> str:
    """A figure as an SVG document without background, to be made under :data:`dyvte.report.style.STYLE`.

    The colours stand in the drawing as they are on paper. A style sheet within it exchanges them where the reader
    prefers dark, which programs that know no style sheets pass over.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    head, opening, rest = buffer.getvalue().partition("<defs>")
    return f"{head}<style>{_dark_rules()}</style>{opening}{rest}"


def _dark_rules() -> str:
    rules = [
        f'[style*="{use}: {light.lower()}"] {{ {use}: {dark} !important }}'
        for light, dark in DARK.items()
        for use in ("fill", "stroke")
    ]
    return f"@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}"
