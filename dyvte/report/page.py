"""Runs of :mod:`dyvte.evaluation.runner` as one web page and as figures for a paper or an issue.

Reads every folder with a ``summary.json`` under a directory. A run's folder may also hold a ``promise.json``
(:class:`dyvte.promise.Promise`), whose curve is then shown.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from matplotlib.figure import Figure

from dyvte.provenance import atomic_write
from dyvte.report.examples import example_cards, plot_examples
from dyvte.report.figures import plot_exit_layers, plot_reliability, plot_risk
from dyvte.report.runs import DENSE, Run, find_runs
from dyvte.report.style import STYLE
from dyvte.report.tables import COLUMNS, KIND_COLUMNS, facts, headline, kind_rows, table_row
from dyvte.report.tradeoff import plot_tradeoff
from dyvte.report.vector import to_svg

TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("dyvte.report", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
)


@dataclass
class Section:
    """What the page shows of one run.

    Attributes:
        run: the run.
        policy: the main policy, whose exits, kinds and examples are shown.
        headline: what it does, in a sentence.
        facts: name and value of what the run was made with.
        table: a row for each policy.
        kinds: a row for each kind of question, under ``policy``.
        figures: see :class:`Drawing`.
        examples: see :func:`dyvte.report.examples.example_cards`, with the image's address.
    """

    run: Run
    policy: str | None
    headline: str | None
    facts: list[tuple[str, str]]
    table: list[dict[str, str]]
    kinds: list[dict[str, str]]
    figures: list[Drawing]
    examples: list[dict[str, Any]]


@dataclass
class Drawing:
    """A figure on the page: the image's address, its caption and its width in rem."""

    image: str
    caption: str
    width: float


def report(directory: str | os.PathLike, output: str | os.PathLike | None = None) -> Path:
    """Writes ``report.html``, which needs no other file, and its figures as SVGs.

    Args:
        directory: a run's folder, or one with runs in it.
        output: where to write; ``<directory>/report`` unless given.

    Returns:
        The path of the page.

    Raises:
        ValueError: there is no run in the directory.
    """
    directory = Path(directory)
    runs = find_runs(directory)
    output = Path(output) if output is not None else directory / "report"
    output.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        sections = [_section(run, output, prefix=f"{_slug(run.name)}-" if len(runs) > 1 else "") for run in runs]
        overview = _overview(runs, output) if len(runs) > 1 else []
    page = TEMPLATES.get_template("page.html")
    path = output / "report.html"
    content = page.render(sections=sections, overview=overview, columns=COLUMNS, kind_columns=KIND_COLUMNS)
    atomic_write(path, content)
    return path


def _slug(name: str) -> str:
    return re.sub(r"[^\w.]+", "-", name)


def _embed(path: Path) -> str:
    kind = "svg+xml" if path.suffix == ".svg" else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _draw(figure: Figure, caption: str, path: Path) -> Drawing:
    atomic_write(path, to_svg(figure))
    return Drawing(_embed(path), caption, figure.get_figwidth() * 6.2)


def _overview(runs: list[Run], output: Path) -> list[Drawing]:
    """Exit layers of all runs in one figure, as far as their models are of one depth."""
    bars = {run.name: run.policies[run.main_policy()]["exit_layers"] for run in runs if run.main_policy()}
    same_depth = {name: counts for name, counts in bars.items() if len(counts) == runs[0].layers}
    if not same_depth:
        return []
    caption = "Exit layers per task: after how many layers visual tokens left."
    return [_draw(plot_exit_layers(same_depth), caption, output / "exit-layers-by-task.svg")]


def _section(run: Run, output: Path, prefix: str) -> Section:
    policy = run.main_policy()
    figures = list(_figures(run, policy))  # all of them, or a fault before any is written
    drawings = [_draw(figure, caption, output / f"{prefix}{name}.svg") for name, figure, caption in figures]
    cards = example_cards(run, policy) if policy is not None else []
    if cards:
        plot_examples(cards, run.layers).savefig(output / f"{prefix}examples.png")
    return Section(
        run=run,
        policy=policy,
        headline=headline(run.policies[policy]) if policy is not None else None,
        facts=facts(run),
        table=[table_row(name, values) for name, values in run.policies.items()],
        kinds=kind_rows(run, policy) if policy is not None else [],
        figures=drawings,
        examples=[card | {"image": _embed(card["picture"])} for card in cards],
    )


def _figures(run: Run, policy: str | None) -> Iterator[tuple[str, Figure, str]]:
    """Name, figure and caption of what there is to show of a run."""
    settings = run.summary["settings"]
    costs = {"flops": "FLOPs of the decoder over the prompt"}
    if run.timed:
        measured = "measured prefill time (vision tower included, median, each policy in turn with the dense model, "
        costs = {"time": f"{measured}batch of {settings['batch_size']})"} | costs
    for cost, meaning in costs.items() if len(run.policies) > 1 else ():
        notes = f"Cost: {meaning}. Bars: standard error; grey steps: the best at each cost, but for the oracle."
        if run.policies[DENSE].get("score") is not None:
            metric = settings["metric"].replace("_", " ")
            yield f"score-{cost}", plot_tradeoff(run, "score", metric, cost), f"Score ({metric}). {notes}"
        caption = f"Answers that differ from the dense model's; upper left is better. {notes}"
        yield f"changed-{cost}", plot_tradeoff(run, "changed", "changed answers", cost), caption
    if policy is not None:
        kinds = run.policies[policy].get("by_kind") or {"all": run.policies[policy]}
        bars = {kind: values["exit_layers"] for kind, values in kinds.items()}
        caption = (
            f"Exit layers of {policy} per kind of question: after how many layers the visual tokens left. Line: mean."
        )
        yield "exit-layers", plot_exit_layers(bars), caption
    promise = run.promise
    if promise is not None:
        caption = "Share of changed answers in every setting, with its upper confidence bound, and what is saved."
        yield "risk", plot_risk(promise), caption
    if promise is not None and promise.reliability is not None:
        caption = "Reliability of the heads: how often an exit agreed, against how sure they were. Area: samples."
        yield "reliability", plot_reliability(promise.reliability), caption
