"""Results of many runs as one table: Markdown for readers, CSV and JSON for programs."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dyvte.integrations.benchmark import Run
from dyvte.integrations.benchmark_results import RECORDED, DamagedError, MissingError, Result, read
from dyvte.provenance import atomic_write, write_json

FIELDS = ("model", "risk", "benchmark", "samples", "score", "score_kept", "agreement", *RECORDED, "prefill_ratio")


def join(runs: Sequence[Run]) -> dict[str, Any]:
    """Everything that is there of these runs.

    Returns:
        ``rows``: those of whole runs, by :data:`FIELDS`, beside the dense run of the same model and benchmark.
        ``missing``: names of runs without results. ``damaged``: by name, what is wrong with the results of others.
        ``made``: by name, versions and hardware.
    """
    results: dict[str, Result] = {}
    missing: list[str] = []
    damaged: dict[str, str] = {}
    for run in runs:
        try:
            results[run.name] = read(run)
        except MissingError:
            missing.append(run.name)
        except DamagedError as error:
            damaged[run.name] = str(error)
    dense = {(run.model, run.benchmark.name): results.get(run.name) for run in runs if run.risk is None}
    rows = []
    for run in runs:
        if run.name not in results:
            continue
        beside = dense.get((run.model, run.benchmark.name)) if run.risk is not None else None
        if beside is not None and beside.answers.keys() != results[run.name].answers.keys():
            damaged[run.name] = f"{run.folder} answers other questions than the dense run: run both again"
            continue
        rows.append(_row(run, results[run.name], beside))
    made = {name: {"versions": result.versions, "hardware": result.hardware} for name, result in results.items()}
    return {"rows": rows, "missing": missing, "damaged": damaged, "made": made}


def _row(run: Run, result: Result, dense: Result | None) -> dict[str, Any]:
    row = {"model": run.model, "risk": run.risk, "benchmark": run.benchmark.name}
    row |= {"samples": len(result.answers), "score": result.score} | {key: result.recorded[key] for key in RECORDED}
    row |= dict.fromkeys(("score_kept", "agreement", "prefill_ratio"))
    if dense is not None:
        same = sum(answer == dense.answers[document] for document, answer in result.answers.items())
        row["agreement"] = same / len(result.answers)
        row["score_kept"] = result.score / dense.score if dense.score else None
        seconds = result.recorded["dense_prefill_seconds"]  # in turns, if they were compared in one run
        if seconds is None and dense.hardware == result.hardware:
            seconds = dense.recorded["prefill_seconds"]
        row["prefill_ratio"] = result.recorded["prefill_seconds"] / seconds if seconds else None
    return {key: row[key] for key in FIELDS}


def markdown(runs: Sequence[Run], rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each model and risk: score and agreement by benchmark, then means over the benchmarks it has."""
    names = list(dict.fromkeys(run.benchmark.name for run in runs))
    titles = ["model", "promised", *names, "score kept", "agreement", "exit layer", "FLOPs removed", "TTFT"]
    lines = [titles, ["---", "---:", *["---:"] * (len(titles) - 2)]]
    for model, risk in dict.fromkeys((run.model, run.risk) for run in runs):
        cells = {row["benchmark"]: row for row in rows if (row["model"], row["risk"]) == (model, risk)}
        lines.append(
            [
                model,
                "dense" if risk is None else f"≤ {100 * risk:g} % changed",
                *(_cell(cells.get(name)) for name in names),
                _mean(cells, "score_kept", "{:.1%}"),
                _mean(cells, "agreement", "{:.2%}"),
                _mean(cells, "mean_exit_layer", "{:.1f}"),
                _mean(cells, "flops_removed", "{:.0%}"),
                _mean(cells, "prefill_ratio", "× {:.2f}"),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    agreement = "" if row["agreement"] is None else f" ({100 * row['agreement']:.1f})"
    return f"{row['score']:.1f}{agreement}"


def _mean(cells: Mapping[str, Mapping[str, Any]], key: str, shown: str) -> str:
    values = [row[key] for row in cells.values() if row[key] is not None]
    return shown.format(statistics.mean(values)) if values else "–"


def write(folder: Path, runs: Sequence[Run], joined: Mapping[str, Any]) -> None:
    """Writes table.md, table.csv and table.json."""
    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(joined["rows"])
    atomic_write(folder / "table.csv", text.getvalue())
    atomic_write(folder / "table.md", markdown(runs, joined["rows"]) + "\n")
    write_json(folder / "table.json", joined)
