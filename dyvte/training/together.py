"""A promise for exit heads on top of a pruning: one path through the grid of prunings and thresholds.

Traces of the pruned model say what every threshold does on top of that pruning. In which order the points of the grid
are tested has to be declared without the samples that calibrate; here other traces declare it: of all points, those
that no other point beats in risk and savings, from the safest to the boldest (Pareto Testing, arXiv 2210.07913).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dyvte.heads import ExitHeads
from dyvte.heads.card import model_card
from dyvte.methods.families import LEARNED, methods_of
from dyvte.promise import IDENTITY, Curve, Promise, boldest_safe
from dyvte.provenance import atomic_write
from dyvte.training.calibrate import (
    check_enough,
    check_traced,
    clopper_pearson,
    disagreement,
    exits_at,
    refuse_training_samples,
    subject_of,
    threshold_grid,
)
from dyvte.training.fit import probability_of
from dyvte.training.held_out import check_held_out
from dyvte.training.store import TraceSet

THRESHOLD = f"{LEARNED}.threshold"


@dataclass(frozen=True)
class GridPath:
    """Points of a grid of prunings and thresholds, from the safest to the boldest.

    Attributes:
        settings: by ``method.argument``; all but the threshold are those of a pruning.
        declared_on: what is remembered of the samples that declared it, as heads remember those of training.
    """

    settings: Sequence[dict[str, Any]]
    declared_on: dict[str, torch.Tensor] | None


def outcomes(heads: ExitHeads, traces: TraceSet, thresholds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What thresholds do on top of the pruning of the traces.

    Returns:
        whether each answer changes, bool [thresholds, n], and the share of the visual-token layers left out,
        float64 [thresholds].
    """
    probability, same = probability_of(heads, traces).double(), traces.agreement >= 1
    counts, visual = visual_counts(traces)
    seen = counts.cumsum(1).double() / (visual[:, None] * traces.num_layers)
    wrong, saved = [], []
    for threshold in thresholds.tolist():
        exits = exits_at(probability, threshold)
        wrong.append(disagreement(same, exits))
        saved.append(1 - seen.gather(1, exits[:, None] - 1).mean())
    return torch.stack(wrong), torch.stack(saved).clamp(0, 1)


def visual_counts(traces: TraceSet) -> tuple[torch.Tensor, torch.Tensor]:
    """How many visual tokens each layer works on without an exit, long [n, L], and how many there are, long [n]."""
    rows = traces.rows
    columns = [
        rows.column(name) if hasattr(rows, "column") else [row[name] for row in rows]
        for name in ("visual_tokens", *(["visual_counts"] if traces.provenance.get("pruning") else []))
    ]
    visual = torch.tensor(columns[0])
    return (torch.tensor(columns[1]) if len(columns) > 1 else visual[:, None].repeat(1, traces.num_layers)), visual


def declare_path(heads: ExitHeads, traces: Sequence[TraceSet], thresholds: torch.Tensor | None = None) -> GridPath:
    """The points of the grid that no other beats, on samples that calibrate nothing.

    It begins with the first pruning, which should be the safest, and heads that never exit.

    Args:
        traces: of the same samples, a set for each pruning.

    Raises:
        ValueError: traces of no pruning, of several at once, or of different samples.
    """
    thresholds = threshold_grid() if thresholds is None else thresholds
    prunings = prunings_of(traces)
    points = []
    for pruning, some in zip(prunings, traces):
        wrong, saved = outcomes(heads, some, thresholds)
        risk = wrong.double().mean(1).tolist()
        points += [(r, s, {**pruning, THRESHOLD: t}) for r, s, t in zip(risk, saved.tolist(), thresholds.tolist())]
    front, best = [{**prunings[0], THRESHOLD: 1.0}], 0.0
    for _, saves, setting in sorted(points, key=lambda point: (point[0], -point[1])):
        if saves > best:
            front.append(setting)
            best = saves
    content = traces[0].content
    return GridPath(front, None if content is None else content.sketch())


def prunings_of(traces: Sequence[TraceSet]) -> list[dict[str, Any]]:
    """The pruning of each set of traces.

    Raises:
        ValueError: traces of no pruning, of several at once, of other models, or of different samples.
    """
    prunings = [some.provenance.get("pruning") for some in traces]
    if not traces or not all(isinstance(pruning, dict) for pruning in prunings):
        raise ValueError(
            "every set of traces must be of one pruning: trace with pruning={fastv.layer: 2, fastv.keep: 0.5}, one "
            "folder for each; {fastv.layer: 2, fastv.keep: 1.0} drops nothing"
        )
    if len({tuple(pruning) for pruning in prunings}) > 1:
        raise ValueError(f"the prunings must be settings of one method, not {prunings}")
    for name in ("content", *IDENTITY):
        if len({str(some.provenance.get(name)) for some in traces}) > 1:
            raise ValueError(f"the sets of traces differ in {name}: trace the same samples with the same model")
    return prunings


def calibrate_together(
    heads: ExitHeads,
    traces: Sequence[TraceSet],
    path: GridPath,
    alpha: float = 0.01,
    delta: float = 0.1,
    shared_images: bool = False,
) -> Promise:
    """The boldest point of a path with P(answer differs from the untouched model's) <= alpha, confidence 1 - delta.

    Args:
        traces: held out from training and from what declared the path; a set for each pruning of the path, all of the
            same samples.
        shared_images: allow other questions about images of training.

    Raises:
        ValueError: too few traces, traces that are not held out or not of these prunings, or no point that holds.
    """
    prunings = prunings_of(traces)
    check_enough(len(traces[0]), alpha, delta)
    shared = refuse_training_samples(heads, traces[0], shared_images)
    if path.declared_on is not None and traces[0].content is not None:
        try:
            check_held_out(path.declared_on, traces[0].content, shared_images)
        except ValueError as error:
            raise ValueError(f"the samples that declared the path count as training here: {error}") from None
    for some in traces:
        check_traced(heads, some)
    n, settings = len(traces[0]), list(path.settings)
    risk, saved = [0.0] * len(settings), [0.0] * len(settings)
    missing = [setting for setting in settings if pruning_of(setting) not in prunings]
    if missing:
        raise ValueError(f"there are no traces of the pruning {pruning_of(missing[0])}, through which the path goes")
    for pruning, some in zip(prunings, traces):
        places = [place for place, setting in enumerate(settings) if pruning_of(setting) == pruning]
        thresholds = torch.tensor([settings[place][THRESHOLD] for place in places], dtype=torch.double)
        if places:
            wrong, left_out = outcomes(heads, some, thresholds)
            for place, share, out in zip(places, wrong.double().mean(1).tolist(), left_out.tolist()):
                risk[place], saved[place] = share, out
    changed = torch.tensor([round(share * n) for share in risk])
    bound = clopper_pearson(changed, n, delta).tolist()
    chosen = boldest_safe(bound, alpha)
    if chosen is None:
        raise ValueError(
            f"not even {settings[0]} keeps the risk below {alpha} with confidence {1 - delta:g}: it changes "
            f"{risk[0]:.3g} of {n} answers. Begin the path with a pruning that drops less, or allow more risk"
        )
    return Promise(
        alpha=alpha,
        delta=delta,
        samples=n,
        methods=list(methods_of(settings[0])),
        curve=Curve({name: [setting[name] for setting in settings] for name in settings[0]}, risk, bound, saved),
        chosen=chosen,
        reliability=None,
        **subject_of(traces[0], shared),
    )


def pruning_of(setting: dict[str, Any]) -> dict[str, Any]:
    """A point of the grid without its threshold."""
    return {name: value for name, value in setting.items() if name != THRESHOLD}


def save_together(heads: ExitHeads, promise: Promise, folder: str | os.PathLike) -> None:
    """Writes heads and promise into a folder, for :func:`dyvte.load`; the heads alone promise nothing."""
    heads.config.calibration, heads.config.threshold = None, promise.setting[THRESHOLD]
    heads.save_pretrained(folder)
    promise.write(folder)
    card = model_card(heads.config, sum(p.numel() for p in heads.parameters()), promise)
    atomic_write(Path(folder, "README.md"), card)
