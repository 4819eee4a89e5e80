"""Traces to heads: the only training there is, on features that a frozen model left behind."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import binary_accuracy, binary_auroc, binary_calibration_error

from dyvte.config import FitSettings
from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.training.deepspeed_config import read_deepspeed
from dyvte.training.epochs import PART, Epochs, Log, split
from dyvte.training.guard_fit import fit_guard
from dyvte.training.identity import IDENTITY
from dyvte.training.labels import check_labels, exit_labels
from dyvte.training.lock import one_run, run_name
from dyvte.training.parallel import Group
from dyvte.training.state import TrainingState
from dyvte.training.store import TraceSet


def fit_heads(
    traces: TraceSet,
    settings: FitSettings | None = None,
    progress: bool = True,
    work: Path | None = None,
    device: str | torch.device | None = None,
    log: Log | None = None,
) -> ExitHeads:
    """Trains heads on traces; the same traces and settings give the same heads.

    Where ``torch.distributed`` is at work, all ranks call this with the same traces and get the same heads, but for
    rounding those of one process. States are read a batch at a time, so memory does not grow with the number of traces.
    Exits that were not traced are not learned, and the heads will not leave there.

    Args:
        progress: show a bar, on rank 0.
        work: a folder for the state of the training. The same call goes on where it was stopped, and ends with the
            same bits; with another number of ranks, but for rounding.
        device: where to compute; the current GPU if there is one. The heads that come back are on the CPU.
        log: called on rank 0 after every epoch, with its number and the losses.

    Raises:
        ValueError: settings that make no heads, too few traces, labels that are all alike, states or a loss that are
            not finite, a state in ``work`` that is damaged or of something else; on all ranks, if on one.
    """
    settings, group = settings or FitSettings(), Group.here(device)
    source, size = traces.provenance, traces.state.shape[-1] // 2
    config = heads_config(source, settings, traces.num_layers, size)
    with group.together():
        check_labels(traces, config.label_rule, [e - 1 for e in config.decided])
        record = {"traces": traces_fingerprint(traces), "settings": settings_record(settings)}
    if any(other != record for other in group.gather(record)):
        raise ValueError("the ranks were given different traces or settings: give all of them the same")
    with ExitStack() as stack:
        state = None
        if work is not None:
            run = run_name(group)
            with group.together():
                Path(work).mkdir(parents=True, exist_ok=True)
                stack.enter_context(one_run(Path(work), run))
            state = TrainingState(Path(work), record, group)
        validation, training = split(len(traces), settings)
        best = Epochs(traces, config, settings, group, validation, training).run(state, progress, log)
    heads = ExitHeads(config)
    heads.heads.load_state_dict(best.pop("weights"))
    if heads.guard is not None:
        fit_guard(heads, *(partial(_parts, traces, index, group) for index in (training, validation)), group)
    heads.config.training = {
        "traces": len(training),
        "validation_traces": len(validation),
        **best,
        "data": source.get("data"),
        "content": source.get("content"),
        "answers": source.get("answers"),
    } | asdict(settings)
    heads.trained_on = None if traces.content is None else traces.content.sketch()
    return heads.eval()


def heads_config(source: Mapping[str, Any], settings: FitSettings, layers: int, size: int) -> ExitHeadsConfig:
    """What heads are trained for: the model that traces come from, as their provenance tells.

    Raises:
        ValueError: there is no exit to decide.
    """
    config = ExitHeadsConfig(
        num_layers=layers,
        hidden_size=size,
        form=settings.form,
        width=settings.width,
        base_model=source.get("base_model"),
        base_revision=source.get("base_revision"),
        identity={name: source[name] for name in IDENTITY if name in source} or None,
        exits=source.get("exits"),
        label_rule=settings.label_rule,
        min_layer=source.get("min_layer", 1),
        lookahead=settings.lookahead,
        guard=settings.guard if settings.form == "shared" else None,
    )
    if not config.decided:
        raise ValueError(f"no exit was traced that can be decided {settings.lookahead} layers before: choose less")
    return config


def settings_record(settings: FitSettings) -> dict[str, Any]:
    """What of the settings determines the heads."""
    record = asdict(settings)
    del record["save_every"]
    if settings.deepspeed is not None:
        record["deepspeed"] = read_deepspeed(settings.deepspeed)
    return record


def traces_fingerprint(traces: TraceSet) -> str:
    """Changes with what traces are of and what they say; not with where they lie."""
    source, names = traces.provenance, (*IDENTITY, "exits", "min_layer", "answers", "max_new_tokens", "batch_size")
    about = {name: source.get(name) for name in (*names, "content" if "content" in source else "data")}
    digest = hashlib.sha256(json.dumps([about, list(traces.state.shape)], sort_keys=True, default=str).encode())
    for start in range(0, len(traces), PART):
        digest.update(traces.agreement[start : start + PART].numpy().tobytes())
    return digest.hexdigest()


def _parts(traces: TraceSet, index: torch.Tensor, group: Group) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the guard looks at: this rank's states and mean visual tokens, part by part."""
    for part in index.split(PART)[group.rank :: group.size]:
        yield traces.state[part], traces.visual[part]


@torch.no_grad()
def logits_of(heads: ExitHeads, state: torch.Tensor, batch_size: int = 512) -> torch.Tensor:
    """Logits of all exit layers for many text states: [n, L, 2d] -> [n, L]."""
    heads.eval()
    return torch.cat([heads(part) for part in state.split(batch_size)])


@torch.no_grad()
def probability_of(heads: ExitHeads, traces: TraceSet, batch_size: int = 512) -> torch.Tensor:
    """What a policy goes by: probabilities of all exit layers, 0 where the guard steps in: [n, L]."""
    heads.eval()
    found = torch.cat([heads.guarded_logits(part).sigmoid() for part in traces.state.split(batch_size)])
    found[:, : heads.config.min_layer - 1] = 0
    untraced = sorted({*range(1, heads.config.num_layers)} - {*(heads.config.exits or range(1, traces.num_layers))})
    found[:, [e - 1 for e in untraced]] = 0
    if heads.guard is None:
        return found
    usual = torch.cat([heads.usual_images(part) for part in traces.visual.split(batch_size)])
    return found.masked_fill(~usual[:, None], 0)


@torch.no_grad()
def features_of(heads: ExitHeads, state: torch.Tensor, batch_size: int = 512) -> torch.Tensor:
    """The heads' features, in which the guard measures distances: [n, L, 2d] -> [n, L, width]."""
    return torch.cat([heads.features(part) for part in state.split(batch_size)])


def log_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean binary cross-entropy per layer, nats: two [n, layers] -> [layers]."""
    return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none").mean(0)


def quality(heads: ExitHeads, traces: TraceSet, rule: str | None = None) -> dict[str, Any]:
    """How well heads predict the labels of traces they were not trained on: per exit layer they decide, and the mean.

    AUROC is left out (None) at layers where every label is the same.
    """
    columns = [e - 1 for e in heads.config.decided]
    labels = exit_labels(traces, rule or heads.config.label_rule)[:, columns]
    logits = logits_of(heads, traces.state)[:, columns]
    layers: list[dict[str, Any]] = []
    for i, loss in enumerate(log_loss(logits, labels).tolist()):
        probability, label = logits[:, i].sigmoid(), labels[:, i].long()
        mixed = 0 < label.sum() < len(label)
        layers.append(
            {
                "exit_layer": columns[i] + 1,
                "positive": label.float().mean().item(),
                "auroc": binary_auroc(probability, label).item() if mixed else None,
                "log_loss": loss,
                "accuracy": binary_accuracy(probability, label).item(),
                "calibration_error": binary_calibration_error(probability, label, n_bins=15).item(),
            }
        )
    mean = {
        key: sum(row[key] for row in layers if row[key] is not None)
        / max(sum(row[key] is not None for row in layers), 1)
        for key in ("auroc", "log_loss", "accuracy", "calibration_error")
    }
    return {
        "parameters": sum(p.numel() for p in heads.parameters()),
        "samples": len(traces),
        "mean": mean,
        "layers": layers,
    }
