"""Epochs over traces: the loop that trains heads, and goes on where it was stopped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from dyvte.config import FitSettings
from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.training.labels import exit_labels
from dyvte.training.learner import Batch, key, make_learner, refuse, weights_of
from dyvte.training.parallel import Group
from dyvte.training.state import Tensors, TrainingState
from dyvte.training.store import TraceSet

PART = 256  # traces read at a time
Log = Callable[[int, dict[str, float]], None]


def split(count: int, settings: FitSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """Which samples choose the epoch, and which train."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed))
    held = max(1, round(settings.validation * count))
    return order[:held], order[held:]


def new_heads(config: ExitHeadsConfig, seed: int) -> ExitHeads:
    """Heads whose weights follow from a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ExitHeads(config)


class Epochs:
    """Epochs over traces, of which the one with the least validation loss is kept."""

    def __init__(
        self,
        traces: TraceSet,
        config: ExitHeadsConfig,
        settings: FitSettings,
        group: Group,
        validation: torch.Tensor,
        training: torch.Tensor,
    ):
        self.traces, self.settings, self.group = traces, settings, group
        self.validation, self.training, self.rule = validation, training, config.label_rule
        steps = settings.epochs * math.ceil(len(training) / settings.batch_size)
        self.learner = make_learner(new_heads(config, settings.seed), settings, steps, group)
        self.best: dict[str, Any] = {"best_epoch": 0, "validation_log_loss": math.inf}

    def run(self, state: TrainingState | None, progress: bool, log: Log | None) -> dict[str, Any]:
        """Trains, from a state if there is one.

        Returns:
            The best epoch, its loss, and its ``weights``.
        """
        settings, epochs = self.settings, self.settings.epochs
        done = self._restore(state.load()) if state is not None else 0
        bar = tqdm(range(epochs), desc="fit", unit="epoch", initial=done, disable=not progress or self.group.rank > 0)
        for epoch in range(done, epochs):
            loss = self._epoch(epoch)
            held_out = self._validate()
            if held_out < self.best["validation_log_loss"]:
                weights = {k: v.cpu().clone() for k, v in self.learner.heads.heads.state_dict().items()}
                self.best = {"best_epoch": epoch + 1, "validation_log_loss": held_out, "weights": weights}
            if state is not None and ((epoch + 1) % settings.save_every == 0 or epoch + 1 == epochs):
                self._save(state, epoch + 1)
            if log is not None and self.group.rank == 0:
                log(epoch + 1, {"loss": loss, "validation_log_loss": held_out})
            bar.update()
        bar.close()
        return self.best

    def _epoch(self, epoch: int) -> float:
        generator = torch.Generator().manual_seed(key(self.settings.seed, "epoch", epoch))
        order = self.training[torch.randperm(len(self.training), generator=generator)]
        losses = [
            self.learner.step(len(index), self.group.share(len(index)), partial(self._read, index))
            for index in order.split(self.settings.batch_size)
        ]
        return sum(losses) / len(losses)

    def _read(self, index: torch.Tensor, places: range) -> Batch:
        mine = index[places.start : places.stop]
        labels = exit_labels(self.traces, self.rule, mine)[:, self.learner.columns]
        return self.traces.state[mine], labels, lambda rows: self._name(mine[rows].tolist())

    def _name(self, places: Sequence[int]) -> list[str]:
        return [self.traces.rows[i]["id"] for i in places]

    @torch.no_grad()
    def _validate(self) -> float:
        """The mean loss of the validation traces, nats: the same bits on all ranks."""
        heads, columns, parts = self.learner.heads, self.learner.columns, self.validation.split(PART)
        heads.eval()
        sums = torch.zeros(len(parts), dtype=torch.double)
        with self.group.together():
            for number in range(self.group.rank, len(parts), self.group.size):
                logits = heads(self.traces.state[parts[number]].to(self.group.device))[:, columns].double().cpu()
                labels = exit_labels(self.traces, self.rule, parts[number])[:, columns].double()
                sums[number] = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
        sums = self.group.sum(sums)
        for part in (parts[number] for number in (~sums.isfinite()).nonzero().flatten().tolist()):
            refuse(self._name([i for i in part.tolist() if not bool(self.traces.state[i].isfinite().all())]))
        return float(sums.sum()) / (len(self.validation) * len(columns))

    def _save(self, state: TrainingState, epoch: int) -> None:
        best = dict(self.best)
        weights = {f"best.{name}": weight for name, weight in best.pop("weights", {}).items()}
        progress = {"epoch": epoch, "best": best} | self.learner.progress()
        state.save(epoch, progress, weights | self.learner.tensors())

    def _restore(self, saved: tuple[dict[str, Any], Tensors] | None) -> int:
        if saved is None:
            return 0
        progress, tensors = saved
        self.learner.restore(progress, tensors)
        self.best = progress["best"] | {"weights": weights_of(tensors, "best.")}
        return progress["epoch"]
