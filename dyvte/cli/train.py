"""From a model and two sets of questions to exit heads that keep a promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from dyvte.cli import fit, trace
from dyvte.cli.arguments import named_keys, read_arguments
from dyvte.config import FitConfig, TraceConfig, TrainConfig

Config = TypeVar("Config")

EXAMPLES = (
    "dyvte train model=llava-hf/llava-1.5-7b-hf data=train.yaml held_out=held-out.yaml output=runs/heads",
    "dyvte train configs/train.yaml   # traces= instead of a model: the same as dyvte fit",
)


def main(arguments: Sequence[str]) -> None:
    """All stages, or, where ``traces`` are named, the last ones alone."""
    if "traces" in named_keys(arguments):
        fit.run(read_arguments(FitConfig, arguments, prog="dyvte train", examples=fit.EXAMPLES))
    else:
        run(read_arguments(TrainConfig, arguments, prog="dyvte train", examples=EXAMPLES))


def run(config: TrainConfig) -> None:
    """Traces both sets of questions with the model, then fits."""
    if config.held_out is None and config.alpha is not None:
        raise ValueError("a promise needs held-out questions: set held_out=DATA, or alpha=null for none")
    if config.mode == "online":
        raise ValueError("mode=online is not there yet: use mode=offline")
    work = Path(config.work or Path("runs", Path(config.output).name))
    folders = {}
    for name, data in (("train", config.data), ("held-out", config.held_out)):
        if data is not None:
            folders[name] = str(work / name)
            trace.run(part_of(config, TraceConfig, data=data, output=folders[name]))
    fit.run(part_of(config, FitConfig, traces=folders["train"], calibration=folders.get("held-out")))


def part_of(config: TrainConfig, kind: type[Config], **others: Any) -> Config:
    """What one stage is told of a config for all."""
    known = {f.name for f in fields(kind)}
    return kind(**{name: value for name, value in vars(config).items() if name in known} | others)
