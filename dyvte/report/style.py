"""The look of every figure: colours, markers and matplotlib's settings."""

from __future__ import annotations

from typing import Any

from matplotlib.ticker import FuncFormatter

# Okabe and Ito's palette: told apart by every kind of colour vision; markers tell them apart in grey.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
MARKERS = ["o", "s", "^", "D", "v", "P", "X"]
INK, FAINT, EDGE, GRID, STEP = "#222222", "#9A9A9A", "#666666", "#E4E4E4", "#B5B5B5"
# What each of these is on a dark page.
DARK = {
    INK: "#E6E6E6",
    FAINT: "#8A8A8A",
    EDGE: "#9A9A9A",
    GRID: "#33373C",
    STEP: "#6A6F75",
    "#FFFFFF": "#16181B",
    "#0072B2": "#4BA3E3",
    "#D55E00": "#FF8A3D",
    "#009E73": "#2FC79A",
    "#CC79A7": "#E29AC2",
    "#56B4E9": "#8FD0F5",
}
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": EDGE,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # a $ in a question is a dollar
    "savefig.dpi": 200,
    "savefig.facecolor": "white",
    "svg.fonttype": "none",  # the reader's own fonts
    "svg.hashsalt": "dyvte",  # the same figure is the same file
}


def per_cent(value: float, _: Any = None) -> str:
    """A share as a label: 0.05 is 5 %."""
    return f"{round(100 * value, 6):g} %"


PER_CENT = FuncFormatter(per_cent)
