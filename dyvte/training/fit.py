"""Traces to heads: the only training there is, on features that a frozen model left behind."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torchmetrics.functional.classification import binary_accuracy, binary_auroc, binary_calibration_error
from tqdm.auto import tqdm

from dyvte.config import FitSettings
from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.training.identity import IDENTITY
from dyvte.training.store import TraceSet

PART = 512  # traces read at a time


def exit_labels(traces: TraceSet, rule: str = "agreement") -> torch.Tensor:
    """Whether the visual tokens can leave, per sample and exit layer: bool [n, L].

    Args:
        rule: "agreement": every answer token is the dense model's; "original" (DyVTE): more than 99 % of them are, and
            the answer's NLL is below 1.03 times the dense one.
    """
    if rule == "agreement":
        return traces.agreement >= 1
    if rule == "original":
        return (traces.agreement > 0.99) & (traces.nll[:].float() < 1.03 * traces.dense_nll[:, None])
    raise ValueError(f"unknown label rule {rule!r}: choose agreement or original")


def fit_heads(traces: TraceSet, settings: FitSettings | None = None, progress: bool = True) -> ExitHeads:
    """Trains heads on traces; the same traces and settings give the same heads.

    States are read a batch at a time, so memory does not grow with the number of traces. Exits that were not traced
    are not learned, and the heads will not leave there.

    Raises:
        ValueError: settings that make no heads, too few traces, labels that are all alike, or states or a loss that
            are not finite.
    """
    settings = settings or FitSettings()
    source = traces.provenance
    config = ExitHeadsConfig(
        num_layers=traces.num_layers,
        hidden_size=traces.state.shape[-1] // 2,
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
    columns = [e - 1 for e in config.decided]
    labels = exit_labels(traces, settings.label_rule)[:, columns]
    if len(traces) < 20:
        raise ValueError(f"{len(traces)} traces are too few to train heads: trace at least some hundred samples")
    if not columns:
        raise ValueError(f"no exit was traced that can be decided {settings.lookahead} layers before: choose less")
    if labels.all() or not labels.any():
        raise ValueError(
            "every exit of every sample has the same label, so there is nothing to learn: "
            f"{'any fixed exit layer keeps all answers' if labels.all() else 'no exit keeps any answer'}"
        )
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(traces), generator=generator)
    held = max(1, round(settings.validation * len(traces)))
    validation, training = order[:held], order[held:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        heads = ExitHeads(config)
        steps = settings.epochs * math.ceil(len(training) / settings.batch_size)
        optimizer = torch.optim.AdamW(heads.heads.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.lr, total_steps=steps, pct_start=0.1)
        best, best_loss, best_epoch = None, math.inf, 0
        for epoch in tqdm(range(settings.epochs), desc="fit", unit="epoch", disable=not progress):
            heads.train()
            for index in training[torch.randperm(len(training), generator=generator)].split(settings.batch_size):
                state = F.dropout(traces.state[index].float(), settings.dropout)
                loss = F.binary_cross_entropy_with_logits(heads(state)[:, columns], labels[index].float())
                _check_finite(loss, traces, index)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            parts = [logits_of(heads, traces.state[part])[:, columns] for part in validation.split(PART)]
            loss = log_loss(torch.cat(parts), labels[validation]).mean().item()
            if loss < best_loss:
                best, best_loss, best_epoch = {k: v.clone() for k, v in heads.state_dict().items()}, loss, epoch + 1
        heads.load_state_dict(best)
    if heads.guard is not None:
        heads.guard.fit(*(partial(_parts, heads, traces, i) for i in (training, validation)), settings.guard)
    heads.config.training = {
        "traces": len(training),
        "validation_traces": held,
        "best_epoch": best_epoch,
        "validation_log_loss": best_loss,
        "seconds": round(time.perf_counter() - began, 1),
        "data": source.get("data"),
        "content": source.get("content"),
        "answers": source.get("answers"),
    } | asdict(settings)
    heads.trained_on = None if traces.content is None else traces.content.sketch()
    return heads.eval()


@torch.no_grad()
def _parts(heads: ExitHeads, traces: TraceSet, index: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What the guard looks at: features and mean visual tokens, part by part."""
    for part in index.split(PART):
        yield heads.features(traces.state[part]), traces.visual[part].float()


def _check_finite(loss: torch.Tensor, traces: TraceSet, index: torch.Tensor) -> None:
    if bool(loss.isfinite()):
        return
    bad = [i for i in index.tolist() if not bool(traces.state[i].isfinite().all())]
    if bad:
        names = ", ".join(repr(traces.rows[i]["id"]) for i in bad)
        raise ValueError(f"the states of sample {names} are not finite: leave them out, or trace again in bfloat16")
    raise ValueError("the loss is no longer finite though all states are: choose a smaller lr")


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
