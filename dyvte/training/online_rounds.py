"""Rounds of tracing and learning: the loop of online training, which goes on where it was stopped."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from dyvte.config import FitSettings, OnlineSettings
from dyvte.heads import ExitHeads, ExitHeadsConfig
from dyvte.training.epochs import Log, new_heads
from dyvte.training.guard_fit import fit_guard
from dyvte.training.labels import refuse_one_label
from dyvte.training.learner import key, make_learner, refuse, weights_of
from dyvte.training.parallel import Group
from dyvte.training.replay import Example, Replay, Stream
from dyvte.training.state import TrainingState

PART = 256  # traces looked at at a time
VALIDATION = 2048  # traces at most


class OnlineRounds:
    """Rounds of tracing and learning, rounds of learning alone from what is kept at the end, then the guard.

    Without the latter, what comes last is hardly learned from, and what came first again and again.

    Args:
        training, validation: what is traced in them, and before.
    """

    def __init__(
        self,
        config: ExitHeadsConfig,
        settings: FitSettings,
        online: OnlineSettings,
        group: Group,
        training: Stream,
        validation: Stream,
    ):
        self.config, self.settings, self.online, self.group = config, settings, online, group
        self.training, self.validation = training, validation
        self.replay, self.unseen = Replay(online.buffer, config), Replay(VALIDATION, config)
        self.best: dict[str, Any] = {"best_round": 0, "validation_log_loss": math.inf}
        kept = min(online.buffer, training.seen(len(training)))
        self.rounds = len(training) + math.ceil(online.settling * kept / (online.updates * online.batch_size))
        self.steps = self.rounds * online.updates
        self.learner = make_learner(new_heads(config, settings.seed), settings, self.steps, group)
        self.labels = torch.zeros(2, dtype=torch.long)  # how many there were: all, and those of exits that keep answers

    def run(self, state: TrainingState, progress: bool, log: Log | None) -> ExitHeads:
        saved, rounds = state.load(), self.rounds
        if saved is not None and "training" in saved[0]:
            heads = ExitHeads(self.config).eval()
            heads.load_state_dict(weights_of(saved[1], "heads."))
            heads.config.training = saved[0]["training"]
            return heads
        done = 0
        if saved is not None:
            done = saved[0]["round"]
            self.learner.restore(*saved)
            self.labels = torch.tensor(saved[0]["labels"])
            self.best = saved[0]["best"] | {"weights": weights_of(saved[1], "best.")}
        for number in range(len(self.validation)):
            self.unseen.add(self._examples(self.validation, number), self.validation.seen(number + 1))
        bar = tqdm(total=rounds, initial=done, desc="train", unit="round", disable=not progress or self.group.rank > 0)
        for number in range(self._first(done), rounds):
            self._trace(number, again=number < done)
            if number < done:
                continue
            losses = [self._step(number, update) for update in range(self.online.updates)]
            if (number + 1) % self.online.save_every == 0 or number + 1 == rounds:
                self._judge(number + 1)
                self._save(state, number + 1)
            if log is not None and self.group.rank == 0:
                log(number + 1, {"loss": sum(losses) / len(losses)})
            bar.update()
        bar.close()
        count, positive = self.labels.tolist()
        refuse_one_label({False: positive < count, True: positive > 0})
        heads = self._finish()
        tensors = {f"heads.{name}": tensor for name, tensor in heads.state_dict().items()}
        state.save(rounds + 1, {"round": rounds, "training": heads.config.training}, tensors)
        return heads

    def _save(self, state: TrainingState, number: int) -> None:
        best = dict(self.best)
        weights = {f"best.{name}": weight for name, weight in best.pop("weights").items()}
        told = {"round": number, "labels": self.labels.tolist(), "best": best} | self.learner.progress()
        state.save(number, told, weights | self.learner.tensors())

    def _first(self, done: int) -> int:
        """The round to begin with, so that the buffer is what it was after so many."""
        done = min(done, len(self.training))
        oldest = self.training.seen(done) - self.online.buffer
        return next((number for number in range(done) if self.training.seen(number + 1) > oldest), done)

    def _trace(self, number: int, again: bool) -> None:
        if number >= len(self.training):  # all is traced
            return
        examples = self._examples(self.training, number)
        self.replay.add(examples, self.training.seen(number + 1))
        if not again:
            labels = [one.labels for one in examples.values()]
            counts = [sum(part.numel() for part in labels), sum(int(part.sum()) for part in labels)]
            self.labels = self.labels + self.group.sum(torch.tensor(counts))

    def _examples(self, stream: Stream, number: int) -> dict[int, Example]:
        return {serial: Example.of(row, self.config) for serial, row in stream.run(number).items()}

    def _step(self, number: int, update: int) -> float:
        seed = key(self.settings.seed, "replay", number, update)
        return self.learner.step(*self.replay.draw(self.online.batch_size, seed))

    @torch.no_grad()
    def _judge(self, number: int) -> None:
        """Keeps the weights if the validation loss is the least so far."""
        heads, group, sums = self.learner.heads, self.group, torch.zeros(2, dtype=torch.double)
        heads.eval()
        columns, examples = [e - 1 for e in self.config.decided], list(self.unseen.examples.values())
        for start in range(0, len(examples), PART):
            part = examples[start : start + PART]
            logits = heads(torch.stack([one.state for one in part]).to(group.device))[:, columns].double().cpu()
            labels = torch.stack([one.labels for one in part]).double()
            loss = F.binary_cross_entropy_with_logits(logits, labels, reduction="sum") / len(columns)
            sums += torch.tensor([float(loss), len(part)])
        loss, count = group.sum(sums).tolist()
        if not math.isfinite(loss):
            bad = [one.id for one in examples if not bool(one.state.isfinite().all())]
            refuse([name for some in group.gather(bad) for name in some])
        if loss / count < self.best["validation_log_loss"]:
            weights = {k: v.cpu().clone() for k, v in heads.heads.state_dict().items()}
            self.best = {"best_round": number, "validation_log_loss": loss / count, "weights": weights}

    def _finish(self) -> ExitHeads:
        """The best heads, and their guard."""
        heads, best = ExitHeads(self.config), dict(self.best)
        heads.heads.load_state_dict(best.pop("weights"))
        if heads.guard is not None:
            fit_guard(heads, partial(self.replay.parts, PART), partial(self.unseen.parts, PART), self.group)
        heads.config.training = {
            "traces": len(self.training.indices),
            "validation_traces": len(self.validation.indices),
            "steps": self.steps,
        } | best
        return heads.eval()
