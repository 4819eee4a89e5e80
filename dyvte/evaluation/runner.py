"""Policies side by side on the same samples: answers, exit layers, scores, and what was saved.

:func:`evaluate` writes a folder:

    config.json      what determines the rows; a folder made with anything else is refused
    <policy>.jsonl   one row per sample; rows that are there are kept, so a run can be stopped and continued
    parts/           rows of other ranks, while a run of several is at work
    timing.json      prefill and decode time of every policy, measured against the dense model
    images/          pictures for the report's examples
    summary.json     everything over samples and per kind, with versions, hardware and settings
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from dyvte.data import Sample
from dyvte.evaluation.metrics import build_metric
from dyvte.evaluation.policies import DENSE, Policy, VisualMask
from dyvte.evaluation.store import ResultFolder, sample_ids, samples_fingerprint
from dyvte.evaluation.subject import Subject
from dyvte.evaluation.summary import summarise
from dyvte.evaluation.timing import time_policies
from dyvte.loading import Sharing, sharing
from dyvte.provenance import hardware, versions
from dyvte.ranks import Ranks


def evaluate(
    model: nn.Module,
    processor: Any,
    samples: Sequence[Sample],
    policies: Mapping[str, Policy],
    output_dir: str | os.PathLike,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 16,
    metric: str = "exact_match",
    template: str | None = None,
    visual_mask: VisualMask | None = None,
    timing_batches: int = 4,
    pictures: int = 24,
    config: Mapping[str, Any] | None = None,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Runs the dense model and every policy over the samples, greedily, and sums up.

    Ranks share the samples; the first one measures time, while the others wait, and sums up. One run at a time can work
    in a folder.

    Args:
        model: the MLLM, in evaluation mode.
        processor: its processor, see :func:`dyvte.data.encode`.
        samples: see :mod:`dyvte.data`.
        policies: by name; an exit policy, a :class:`~dyvte.evaluation.policies.PerSampleExit`, or, for anything else
            that changes the model while it runs, a callable that takes the model and returns a context manager (what it
            yields may have ``layers``).
        output_dir: see the module's text.
        batch_size: samples at once, also where time is measured.
        max_new_tokens: longest answer.
        metric: a name in :data:`dyvte.evaluation.metrics.METRICS`.
        template: chat template, where the processor has none.
        visual_mask: called with the model's inputs, gives bool [batch, sequence]; where ``input_ids`` cannot show it.
        timing_batches: batches on which time is measured; 0 measures none.
        pictures: pictures kept for examples, as many again for samples whose answer changed.
        config: anything else to keep with the results, such as the configs they come from.
        progress: whether to show a bar.
        ranks: who shares the samples, each with a copy of the model, or all with their part of each tensor; this
            process alone if not given.

    Returns:
        The content of ``summary.json``. Times are in seconds per batch: prefill is everything up to the first new
        token, the vision tower included, of which decoder is its layers alone; decode is per further token. Shares lie
        in 0 ... 1. Bytes and floating-point operations are of a single sample's prompt in the decoder, padding left
        out, but for ``cache_bytes``, which is what the cache of a whole batch took.

    Raises:
        ValueError: no samples, two of one id, bad names or sizes, a folder that holds results of something else or
            that another run is working in, or ranks that have to call the model equally often (FSDP2, ZeRO-3).
        RankError: any of this on another rank.
    """
    if len(samples) == 0:
        raise ValueError("there are no samples to evaluate: check the data config")
    if batch_size < 1 or max_new_tokens < 1:
        raise ValueError(f"batch_size and max_new_tokens must be 1 or more, not {batch_size} and {max_new_tokens}")
    bad = [name for name in policies if name == DENSE or not re.fullmatch(r"[\w.,+=@-]+", name)]
    if bad:
        raise ValueError(f"policy names {bad} do not work: use letters, digits and . , + = @ - _, and not {DENSE!r}")
    twice = [name for name, times in Counter(sample_ids(samples)).items() if times > 1]
    if twice:
        raise ValueError(f"{len(twice)} ids belong to more than one sample, such as {twice[0]!r}: make them unique")
    ranks = Ranks() if ranks is None else ranks
    shared = sharing(model) if ranks.world_size > 1 else "none"
    if shared == "weights":
        raise ValueError(
            "ranks that share weights (fsdp2, zero3) must call the model equally often, and with exits they do not: "
            "use shard=none, tp or device_map"
        )
    scorer = build_metric(metric, sync_on_compute=False)  # the first rank alone sums up, from the rows of all
    subject = Subject(model, processor, scorer, max_new_tokens, template, visual_mask)
    settings = {
        "model": subject.identity(),
        "data": getattr(samples, "fingerprint", None) or samples_fingerprint(samples),
        "samples": len(samples),
        "metric": metric,
        "max_new_tokens": max_new_tokens,
        "template": template,
    }
    subject.check(samples[0], policies.values())
    folder = ResultFolder(output_dir, None if ranks.first else ranks.rank)
    all_policies = {DENSE: None, **policies}
    progress = progress and ranks.first
    with folder.held(ranks):
        if ranks.first:
            folder.claim(settings, policies)
            folder.join_parts()
        ranks.wait()
        rows = {name: folder.read_rows(name) for name in all_policies}
        ranks.wait()  # nobody writes before all have read
        _answer_all(subject, folder, samples, all_policies, rows, batch_size, pictures, progress, ranks, shared)
        ranks.wait()
        if ranks.first:
            folder.join_parts()
            rows = {name: folder.read_rows(name) for name in all_policies}
        timing = {}
        if ranks.first or shared == "work":
            timing = time_policies(subject, folder, samples, policies, batch_size, timing_batches, progress)
        if not ranks.first:
            ranks.wait()
            return folder.read_summary()
        summary = _summary(subject, settings, rows, timing, batch_size, config)
        folder.write_summary(summary)
        ranks.wait()
    return summary


def _summary(
    subject: Subject,
    settings: dict[str, Any],
    rows: dict[str, dict[str, Any]],
    timing: Mapping[str, Any],
    batch_size: int,
    config: Mapping[str, Any] | None,
) -> dict[str, Any]:
    ids = sorted(rows[DENSE], key=lambda name: rows[DENSE][name]["index"])
    return {
        "settings": settings | {"batch_size": batch_size, "model_name": subject.name},
        "config": dict(config or {}),
        "versions": versions(),
        "hardware": hardware(subject.model),
        "layers": subject.num_layers,
        "policies": {
            name: summarise(
                subject.scorer, [rows[name][i] for i in ids], [rows[DENSE][i] for i in ids], subject.num_layers
            )
            | {"timing": timing.get(name)}
            for name in rows
        },
    }


def _answer_all(
    subject: Subject,
    folder: ResultFolder,
    samples: Sequence[Sample],
    policies: Mapping[str, Policy | None],
    rows: dict[str, dict[str, Any]],
    batch_size: int,
    pictures: int,
    progress: bool,
    ranks: Ranks,
    shared: Sharing,
) -> None:
    """Adds the rows that are missing, batch by batch, to the files and to ``rows``; of a rank's share of the batches.

    Ranks that share the work of each batch (tensor parallel) go through all of them, and the first one writes.
    """
    # When every policy has every row, no sample needs to be read again.
    todo = range(len(samples)) if any(len(known) < len(samples) for known in rows.values()) else range(0)
    changed = sum(1 for name in policies for row in rows[name].values() if not row.get("agrees", True))
    bar = tqdm(total=len(samples), desc="evaluate", unit="sample", disable=not progress)
    with bar, folder.row_files(policies) as files:
        bar.update(len(samples) - len(todo))
        starts = todo[::batch_size]
        for start in starts if shared == "work" else starts[ranks.rank :: ranks.world_size]:
            if shared == "none":
                ranks.check()
            batch = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
            lacking = [name for name in policies if any(sample.id not in rows[name] for sample in batch)]
            inputs = subject.encode(batch) if lacking else None
            for name in lacking:
                for place, row in enumerate(subject.answer(inputs, policies[name], batch)):
                    if row["id"] in rows[name]:
                        continue
                    row["index"] = start + place
                    dense = row if name == DENSE else rows[DENSE][row["id"]]
                    row["agrees"] = row["ids"] == dense["ids"]
                    rows[name][row["id"]] = row
                    if shared == "work" and not ranks.first:
                        continue
                    files[name].write(json.dumps(row) + "\n")
                    changed += not row["agrees"]
                    if start + place < pictures or (not row["agrees"] and changed <= pictures):
                        folder.save_picture(start + place, batch[place])
                files[name].flush()
            bar.update(len(batch) if shared == "work" else min(len(batch) * ranks.world_size, len(samples) - bar.n))
