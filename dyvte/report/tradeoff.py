"""Policies on the plane of cost and quality."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from dyvte.report.runs import DENSE, Run
from dyvte.report.style import COLOURS, FAINT, INK, MARKERS, PER_CENT, STEP, per_cent

SETTING = re.compile(r"^(?P<family>.+?)[-=@](?P<setting>[\d.]+%?)$")  # fixed-3, learned@0.9


def _flops_left(values: Mapping[str, Any]) -> float:
    return 1 - values["flops_removed"]


def _time_left(values: Mapping[str, Any]) -> float | None:
    return values["timing"]["prefill_ratio"] if values.get("timing") else None


COSTS = {
    "time": ("measured prefill time, share of dense", _time_left),
    "flops": ("decoder prefill FLOPs, share of dense", _flops_left),
}


def plot_tradeoff(run: Run, quantity: str, label: str, cost: str) -> Figure:
    """``score`` or ``changed`` of every policy against a cost, one of :data:`COSTS`.

    Upper left is better in all of them; changed answers are on a logarithmic axis that points down.
    """
    cost_label, cost_of = COSTS[cost]
    figure = Figure(figsize=(4.2, 3.9), layout="constrained")
    axis = figure.subplots()
    floor = 0.5 / run.policies[DENSE]["n"]  # where no changed answer at all is drawn
    families = policy_families([name for name in run.policies if name != DENSE])
    if quantity == "changed":
        axis.set_yscale("log")
        axis.axhline(max(0.01, floor), color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    points = _draw_families(axis, run, families, quantity, cost_of, floor)
    if quantity != "changed":
        dense = run.policies[DENSE][quantity]
        points.append((1.0, dense))
        axis.axhline(dense, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        axis.plot(1, dense, "*", color=INK, markersize=12, markeredgecolor="white", label=DENSE, zorder=4)
    front = pareto_front(points, lower_is_better=quantity == "changed")
    if front:
        axis.step(*zip(*front), where="post", color=STEP, linewidth=1.4, zorder=2)
    axis.set(xlabel=cost_label, ylabel=label)
    axis.xaxis.set_major_formatter(PER_CENT)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.yaxis.set_major_formatter(PER_CENT)
    axis.margins(0.06, 0.08)
    if quantity == "changed":
        lowest, highest = floor / 1.6, max(1.0, axis.get_ylim()[1])
        ticks = [10.0**-k for k in range(5) if 3 * floor < 10.0**-k]
        axis.set_yticks([*ticks, floor], [*(per_cent(tick) for tick in ticks), "none"])
        axis.yaxis.set_minor_locator(NullLocator())
        axis.set_ylim(highest, lowest)
    figure.legend(loc="outside lower center", ncols=3, columnspacing=1.4, handletextpad=0.4)
    figure.draw_without_rendering()  # fixes the places that labels have to keep clear of
    _label_settings(axis, families)
    return figure


def _draw_families(
    axis: Axes,
    run: Run,
    families: Mapping[str, list[tuple[str, str]]],
    quantity: str,
    cost: Callable[[Mapping[str, Any]], float | None],
    floor: float,
) -> list[tuple[float, float]]:
    """Draws a line or a marker for each family; the points are what a policy can reach without knowing the answers."""
    points: list[tuple[float, float]] = []
    for i, (family, members) in enumerate(families.items()):
        known = [(cost(run.policies[name]), *_value(run.policies[name], quantity, floor)) for name, _ in members]
        known = sorted(item for item in known if item[0] is not None and item[1] is not None)
        if not known:
            continue
        x, y, below, above = zip(*known)
        if family != "oracle":
            points += zip(x, y)
        look = {"color": COLOURS[i % len(COLOURS)], "zorder": 3}
        axis.errorbar(x, y, yerr=(below, above), fmt="none", elinewidth=0.9, alpha=0.6, **look)
        marks = {"marker": MARKERS[i % len(MARKERS)], "markersize": 6, "markeredgecolor": "white"}
        axis.plot(x, y, linewidth=1.1 if len(known) > 1 else 0, label=family, markeredgewidth=0.6, **marks, **look)
    return points


def _value(values: Mapping[str, Any], quantity: str, floor: float) -> tuple[float | None, float, float]:
    """A quantity and the lengths of its error bar below and above."""
    if quantity == "changed":
        changed, error = 1 - values["agreement"], values["agreement_stderr"]
        shown = max(changed, floor)
        return shown, shown - max(changed - error, floor), max(changed + error - shown, 0.0)
    error = values.get("stderr") or 0.0
    return values.get(quantity), error, error


def policy_families(names: Sequence[str]) -> dict[str, list[tuple[str, str]]]:
    """Policies that differ in one number belong together: name and setting by family."""
    matches = {name: SETTING.match(name) for name in names}
    sizes = Counter(match["family"] for match in matches.values() if match)
    families: dict[str, list[tuple[str, str]]] = {}
    for name, match in matches.items():
        if match is None or sizes[match["family"]] == 1:
            families[name] = [(name, match["setting"] if match else "")]
        else:
            family = f"{match['family']}, swept" if match["family"] in names else match["family"]
            families.setdefault(family, []).append((name, match["setting"]))
    return families


def _label_settings(axis: Axes, families: Mapping[str, list[tuple[str, str]]]) -> None:
    """Writes the settings of a family beside its points, leaving out those that would touch another."""
    taken: list[tuple[float, float]] = []
    for line in axis.get_lines():
        settings = [setting.rstrip("%") for _, setting in families.get(line.get_label(), [])]
        points = list(zip(line.get_xdata(), line.get_ydata()))
        # Points are sorted by cost, and cost rises with the setting of a family.
        names = sorted(settings, key=float) if len(settings) > 1 and all(settings) else []
        if len(names) != len(points):
            continue
        for i in [0, len(points) - 1, *range(1, len(points) - 1)]:
            x, y = axis.transData.transform(points[i]) / axis.figure.dpi * 72
            if all(abs(x - a) > 22 or abs(y - b) > 10 for a, b in taken):
                taken.append((x, y))
                options = {"xytext": (5, -9), "textcoords": "offset points", "fontsize": 7, "zorder": 5}
                axis.annotate(names[i], points[i], color=line.get_color(), **options)


def pareto_front(points: Sequence[tuple[float, float]], lower_is_better: bool = False) -> list[tuple[float, float]]:
    """The points that nothing cheaper matches, by rising cost."""
    sign = -1 if lower_is_better else 1
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    if front:
        front.append((max(x for x, _ in points), front[-1][1]))
    return front
