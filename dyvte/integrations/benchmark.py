"""A reviewer's table from lmms-eval: which runs it takes, models x promised risks x benchmarks, and their commands."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from dyvte.yaml_files import read_yaml

READY = Path(__file__).with_name("benchmarks.yaml")
RECORD = "dyvte.json"
PLANNED = {"record", "risk", "compare"}  # arguments that differ from run to run
SIGNS = set(",='\"\n")  # what lmms-eval reads into arguments


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One column of the table.

    Attributes:
        name: in the table.
        task: in lmms-eval.
        metrics: of the task; their sum is the score.
        filter: of lmms-eval, whose output is scored.
        scale: what the score is multiplied by.
        judge: an API model reads the answers.
    """

    name: str
    task: str
    metrics: tuple[str, ...]
    filter: str = "none"
    scale: float = 1.0
    judge: bool = False


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of lmms-eval: a model on a benchmark.

    Attributes:
        model: its name in the table.
        risk: share of answers that may change; None for the dense model.
        benchmark: what is asked.
        folder: where its results lie.
        arguments: those of ``--model_args``.
        limit: how many questions; all if None.
    """

    model: str
    risk: float | None
    benchmark: Benchmark
    folder: Path
    arguments: Mapping[str, Any]
    limit: int | None

    @property
    def setting(self) -> str:
        """How the run differs from others of its model and benchmark."""
        return "dense" if self.risk is None else f"risk {self.risk:g}"

    @property
    def name(self) -> str:
        return f"{self.model}, {self.setting}, {self.benchmark.name}"

    def command(self, launcher: str, options: Mapping[str, Any], compare: bool = False) -> str:
        """The shell's command line.

        Args:
            launcher: what starts lmms-eval.
            options: its further options; those that are None are left out.
            compare: with exits, answer dense, too, in turns.
        """
        given = self.arguments | {"record": self.folder / RECORD}
        if compare and self.risk is not None:
            given["compare"] = "true"
        words = {
            "model": "dyvte",
            "model_args": ",".join(f"{name}={value}" for name, value in given.items()),
            "tasks": self.benchmark.task,
            "output_path": self.folder,
            "limit": self.limit,
        } | options
        pairs = [f"--{name} {shlex.quote(str(value))}" for name, value in words.items() if value is not None]
        return f"{launcher} {' '.join(pairs)} --log_samples"


def benchmarks(chosen: Sequence[str] | Mapping[str, Any] | None) -> list[Benchmark]:
    """Those of :data:`READY`, some of them by name, or others in the same form.

    Raises:
        ValueError: an unknown name, or an entry that is none.
    """
    ready = read_yaml(READY)
    if chosen is None or isinstance(chosen, Mapping):
        return [_benchmark(name, entry) for name, entry in (chosen or ready).items()]
    for name in chosen:
        if name not in ready:
            near = difflib.get_close_matches(name, ready, n=1, cutoff=0.3)
            remedy = f"did you mean {near[0]}?" if near else f"choose from {', '.join(ready)}"
            raise ValueError(f"there is no ready benchmark {name!r}: {remedy} (others are given as a mapping)")
    return [_benchmark(name, ready[name]) for name in dict.fromkeys(chosen)]


def _benchmark(name: str, entry: Any) -> Benchmark:
    known = {field.name for field in fields(Benchmark)} - {"name"}
    if not isinstance(entry, Mapping) or not {"task", "metrics"} <= set(entry) <= known:
        raise ValueError(f"benchmark {name} must be a mapping with task and metrics, of {', '.join(sorted(known))}")
    _check_folder_name("a benchmark", name)
    metrics, scale = entry["metrics"], entry.get("scale", 1)
    if not isinstance(metrics, list) or not metrics:
        raise ValueError(f"metrics of benchmark {name} must be a list such as [exact_match], not {metrics!r}")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise ValueError(f"scale of benchmark {name} must be a number, not {scale!r}: 100 makes percent of a share")
    return Benchmark(name=name, **dict(entry) | {"metrics": tuple(metrics)})


def plan(
    models: Mapping[str, Any],
    risks: Sequence[float],
    chosen: Sequence[Benchmark],
    output: Path,
    limit: int | None = None,
) -> list[Run]:
    """All runs, by model, dense before the risks.

    Args:
        models: by their name in the table, arguments of ``--model dyvte``: base, pretrained, heads, the base's own.
        risks: shares of answers that may change, in (0, 1).
        chosen: benchmarks.
        output: folder of all results.
        limit: how many questions of each benchmark; all if not given.

    Raises:
        ValueError: something that cannot be an argument, or is missing.
    """
    if not models:
        raise ValueError("models is empty: name at least one, with base, pretrained and heads")
    if SIGNS & set(str(output)):
        raise ValueError(f"output {output} becomes an argument of lmms-eval, which takes no , = or quotes there")
    for risk in risks:
        if isinstance(risk, bool) or not isinstance(risk, (int, float)) or not 0 < risk < 1:
            raise ValueError(f"risks must lie strictly between 0 and 1, not {risk}: shares of answers that may change")
    runs = []
    for name, arguments in models.items():
        _check(name, arguments)
        dense = {key: value for key, value in arguments.items() if key not in ("heads", "other_weights")}
        for risk in (None, *dict.fromkeys(risks)):
            given = dense if risk is None else {**arguments, "risk": risk}
            place = output / name / ("dense" if risk is None else f"risk-{risk:g}")
            runs += [
                Run(model=name, risk=risk, benchmark=b, folder=place / b.name, arguments=given, limit=limit)
                for b in chosen
            ]
    return runs


def _check(name: str, arguments: Any) -> None:
    _check_folder_name("a model", name)
    if not isinstance(arguments, Mapping) or not {"base", "pretrained", "heads"} <= set(arguments):
        raise ValueError(f"models.{name} must be a mapping with base (a model of lmms-eval), pretrained and heads")
    if PLANNED & set(arguments):
        raise ValueError(f"models.{name} sets {', '.join(sorted(PLANNED & set(arguments)))}, which the plan does")
    for key, value in arguments.items():
        if SIGNS & set(str(value)):
            raise ValueError(f"models.{name}.{key} is {value!r}: lmms-eval takes no , = or quotes in arguments")


def _check_folder_name(what: str, name: Any) -> None:
    if not isinstance(name, str) or not name or name.startswith(".") or (SIGNS | {"/"}) & set(name):
        raise ValueError(f"the name of {what} becomes a folder and an argument, which cannot be {name!r}")
