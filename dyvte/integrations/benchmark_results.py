"""What lmms-eval and the exits wrote about a run, read and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dyvte.integrations.benchmark import RECORD, Run

AGAIN = "run its command again"
RECORDED = (
    "mean_exit_layer",
    "visual_layers_removed",
    "flops_removed",
    "prefill_seconds",
    "dense_prefill_seconds",
)


class MissingError(ValueError):
    """A run has left nothing yet."""


class DamagedError(ValueError):
    """A run has left something else than whole results of what was planned."""


@dataclass(frozen=True)
class Result:
    """One run's results.

    Attributes:
        score: on the benchmark's scale.
        answers: by document, what lmms-eval scored.
        recorded: means over the samples, see :class:`dyvte.integrations.lmms_record.TaskRecord`.
        versions, hardware: what it ran with and on.
    """

    score: float
    answers: Mapping[str, list[Any]]
    recorded: Mapping[str, Any]
    versions: Mapping[str, str]
    hardware: Mapping[str, Any]


def read(run: Run) -> Result:
    """The latest results of a run.

    Raises:
        MissingError: there are none.
        DamagedError: they are not whole, or of another model, limit or task.
    """
    found = sorted(run.folder.rglob("*_results.json"), key=lambda path: path.name)
    if not found:
        raise MissingError(f"{run.name}: no results in {run.folder}")
    path, task = found[-1], run.benchmark.task
    content = _mapping(path)
    config = content.get("config") or {}
    _check_config(run, config, path)
    score = sum(_score(run, content, metric, path) for metric in run.benchmark.metrics)
    samples = path.with_name(path.name.removesuffix("results.json") + f"samples_{task}.jsonl")
    answers = _answers(samples)
    record = _mapping(run.folder / RECORD)
    recorded = (record.get("tasks") or {}).get(task)
    if not isinstance(recorded, Mapping) or not {"samples", *RECORDED} <= set(recorded):
        raise DamagedError(f"{run.folder / RECORD} says nothing of task {task}: {AGAIN}")
    if not len(answers) == recorded["samples"] == _count(content, task):
        raise DamagedError(
            f"{run.folder}: {len(answers)} samples are logged, {_count(content, task)} were scored and "
            f"{recorded['samples']} recorded: {AGAIN}"
        )
    return Result(run.benchmark.scale * score, answers, recorded, record["versions"], record["hardware"])


def _mapping(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{path} cannot be read ({error}): {AGAIN}") from None
    if not isinstance(content, dict):
        raise DamagedError(f"{path} holds no results: {AGAIN}")
    return content


def _check_config(run: Run, config: Mapping[str, Any], path: Path) -> None:
    """The results must be those of the run that is planned now."""
    pairs = (part.partition("=") for part in str(config.get("model_args", "")).split(","))
    given = {name: value for name, _, value in pairs if name not in ("record", "compare")}
    planned = {name: str(value) for name, value in run.arguments.items()}
    other = sorted(name for name in given.keys() | planned.keys() if given.get(name) != planned.get(name))
    if config.get("model") != "dyvte" or other:
        raise DamagedError(f"{path} was made with other arguments ({', '.join(other) or 'model'}): {AGAIN}")
    limit = config.get("limit")
    limit = None if limit == -1 else limit
    if limit != run.limit or config.get("offset"):
        raise DamagedError(f"{path} was made with limit {limit}, not {run.limit}: {AGAIN}")


def _score(run: Run, content: Mapping[str, Any], metric: str, path: Path) -> float:
    key = f"{metric},{run.benchmark.filter}"
    score = ((content.get("results") or {}).get(run.benchmark.task) or {}).get(key)
    if isinstance(score, bool) or not isinstance(score, (int, float)) or score != score:
        judge = " (did the judge answer?)" if run.benchmark.judge else ""
        raise DamagedError(f"{path} has no number for {key} of task {run.benchmark.task}{judge}: {AGAIN}")
    return float(score)


def _count(content: Mapping[str, Any], task: str) -> Any:
    return ((content.get("n-samples") or {}).get(task) or {}).get("effective")


def _answers(path: Path) -> dict[str, list[Any]]:
    """By document, its answers: one for each filter of the task."""
    answers: dict[str, list[Any]] = {}
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            sample = json.loads(line)
            # lmms-eval leaves the answer out where it is the filtered one, and lists of one now and then.
            answer = sample["resps"] if "resps" in sample else sample["filtered_resps"]
            while isinstance(answer, list) and len(answer) == 1:
                answer = answer[0]
            answers.setdefault(str(sample["doc_id"]), []).append(answer)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{path} cannot be read ({type(error).__name__}: {error}): {AGAIN}") from None
    return answers
