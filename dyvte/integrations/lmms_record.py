"""What exits did while lmms-eval asked, task by task: counted, joined over ranks, shown, written."""

from __future__ import annotations

import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dyvte.evaluation.costs import pass_flops
from dyvte.provenance import hardware, versions, write_json

if TYPE_CHECKING:
    from torch import nn

    from dyvte.runtime.handle import PromptRecord

COLUMNS = ("task", "n", "exit layer", "agreement", "visual layers removed", "FLOPs removed", "prefill", "dense prefill")


@dataclass
class TaskRecord:
    """The requests of one task.

    Attributes:
        samples: how many.
        exits: how often each exit layer was taken.
        places: visual tokens, summed over the layers that worked on them.
        dense_places: the same without exits.
        flops, dense_flops: of the decoder's passes over the prompts, see :mod:`dyvte.evaluation.costs`.
        seconds, dense_seconds: of each pass over prompts.
        compared: how many answers were compared with dense ones.
        changed: those that differ: ``{doc_id, dense, exits}``.
    """

    samples: int = 0
    exits: Counter[int] = field(default_factory=Counter)
    places: int = 0
    dense_places: int = 0
    flops: int = 0
    dense_flops: int = 0
    seconds: list[float] = field(default_factory=list)
    dense_seconds: list[float] = field(default_factory=list)
    compared: int = 0
    changed: list[dict[str, Any]] = field(default_factory=list)

    def add(self, prompts: Iterable[PromptRecord], config: Any) -> None:
        """Counts prompts that ran under exits.

        Args:
            prompts: see :attr:`dyvte.Handle.record`.
            config: of the decoder.
        """
        for prompt in prompts:
            self.exits.update(prompt.layers.tolist())
            for text, visual, counts in zip(prompt.text.tolist(), prompt.visual.tolist(), prompt.counts.T.tolist()):
                dense = [visual] * len(counts)
                self.places += sum(counts)
                self.dense_places += sum(dense)
                self.flops += pass_flops(config, text, counts)
                self.dense_flops += pass_flops(config, text, dense)

    def compare(self, ids: Sequence[Any], dense: Sequence[Any], exits: Sequence[Any]) -> None:
        """Notes which answers are not the dense ones."""
        self.compared += len(ids)
        self.changed += [{"doc_id": i, "dense": d, "exits": e} for i, d, e in zip(ids, dense, exits) if d != e]

    def summary(self) -> dict[str, Any]:
        """Shares and means; null where there is nothing to say."""
        return {
            "samples": self.samples,
            "mean_exit_layer": sum(e * n for e, n in self.exits.items()) / self.exits.total() if self.exits else None,
            "exit_layers": {str(layer): n for layer, n in sorted(self.exits.items())},
            "visual_layers_removed": 1 - self.places / self.dense_places if self.dense_places else None,
            "flops_removed": 1 - self.flops / self.dense_flops if self.dense_flops else None,
            "prefill_seconds": statistics.median(self.seconds) if self.seconds else None,
            "dense_prefill_seconds": statistics.median(self.dense_seconds) if self.dense_seconds else None,
            "agreement": 1 - len(self.changed) / self.compared if self.compared else None,
            "changed": self.changed,
        }


def joined(tasks: Mapping[str, TaskRecord]) -> dict[str, dict[str, Any]]:
    """The summaries of all tasks, over the records of all ranks, which call this together."""
    ranks = [tasks]
    if dist.is_initialized():
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, tasks)
    whole: dict[str, TaskRecord] = {}
    for name, record in (named for tasks in ranks for named in tasks.items()):
        into = whole.setdefault(name, TaskRecord())
        for key, value in vars(record).items():
            setattr(into, key, getattr(into, key) + value)
    return {name: record.summary() for name, record in whole.items()}


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown, a row for each task."""
    rows = [COLUMNS, ("---", *["---:"] * (len(COLUMNS) - 1))]
    for name, summary in summaries.items():
        exit_layer, seconds = summary["mean_exit_layer"], ("prefill_seconds", "dense_prefill_seconds")
        rows.append(
            (
                name,
                str(summary["samples"]),
                "–" if exit_layer is None else f"{exit_layer:.2f}",
                *(_percent(summary[key]) for key in ("agreement", "visual_layers_removed", "flops_removed")),
                *("–" if summary[key] is None else f"{1000 * summary[key]:.1f} ms" for key in seconds),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def write(path: str | os.PathLike, tasks: Mapping[str, Any], settings: Mapping[str, Any], model: nn.Module) -> None:
    """Writes the summaries as JSON, with what they were made from."""
    made = {"settings": dict(settings), "versions": versions(), "hardware": hardware(model)}
    write_json(path, made | {"tasks": dict(tasks)})
