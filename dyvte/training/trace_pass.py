"""The pass of a trace: nobody leaves, and branches are born beside the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.groups import Group, gather_columns, text_states
from dyvte.runtime.placement import shared_by_ranks
from dyvte.runtime.prefill import PromptPass
from dyvte.runtime.prompt import Prompt
from dyvte.runtime.reduction import Reduction
from dyvte.runtime.tokens import KeptTokens
from dyvte.runtime.vision import VisionAttention
from dyvte.training.trace_head import TraceHead

LOGITS_AT_ONCE = 256 * 2**20  # bytes of logits, in float32


class TraceError(ValueError):
    """Samples of a batch that cannot be traced.

    Attributes:
        rows: which of the batch.
        reason: what is wrong with them, and the remedy.
    """

    def __init__(self, rows: Sequence[int], reason: str):
        super().__init__(rows, reason)
        self.rows, self.reason = list(rows), reason

    def __str__(self) -> str:
        return f"samples {self.rows} have {self.reason}"


@dataclass
class Trace:
    """What one pass teaches. Column e - 1 stands for exit layer e = 1 ... L; e = L is the dense model itself.

    Where an exit was not traced (see ``exits`` of :func:`trace_batch`), or the model does not allow it, agreement is 0
    and the other figures are NaN.

    Attributes:
        state: float32 [batch, L, 2d], the text state after every layer (``Prompt.reader``).
        visual: float32 [batch, d], the mean of the visual tokens before the first layer.
        agreement: float32 [batch, L], the share of answer tokens whose most likely token is the dense model's.
        nll: float32 [batch, L], negative log-likelihood of the answer, nats per token.
        kl: float32 [batch, L], KL(exit || dense) of the next token at the last prompt position, nats (the criterion of
            VTW, arXiv 2405.05803).
        dense_nll: float32 [batch].
        text_tokens, visual_tokens: long [batch], how many of each the prompt has.
        visual_counts: long [batch, L], the visual tokens that every layer works on without an exit.
    """

    state: torch.Tensor
    visual: torch.Tensor
    agreement: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    dense_nll: torch.Tensor
    text_tokens: torch.Tensor
    visual_tokens: torch.Tensor
    visual_counts: torch.Tensor

    def to(self, device: str | torch.device) -> Trace:
        return Trace(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


class TracePass(PromptPass):
    """A pass in which nobody leaves, and branches are born beside the batch."""

    def __init__(
        self,
        spec: DecoderSpec,
        prompt: Prompt,
        hidden: torch.Tensor,
        cache: Any,
        past: torch.Tensor,
        labels: torch.Tensor | None,
        exits: Sequence[int],
    ):
        answer = None if labels is None else (labels.to(prompt.visual.device) != -100) & prompt.valid
        prompt = Prompt.from_masks(prompt.visual, prompt.valid, answer, prompt.ids, prompt.copies)
        super().__init__(spec, prompt, hidden, cache, past)
        self.exits = exits
        refuse_without_image(prompt.can_leave)
        self.text = KeptTokens.from_mask(prompt.text)
        self.reads = KeptTokens.from_mask(self._predicting())
        self.targets: torch.Tensor | None = None
        if labels is not None:
            self.targets = labels.to(self.reads.index.device).gather(
                1, (self.reads.index + 1).clamp(max=self.length - 1)
            )
        self.visual = prompt.visual_state(spec.read(hidden))
        self.states: list[torch.Tensor] = []
        self.rows: torch.Tensor | None = None  # [exits + 1, batch, reads, d]: branch by branch, the dense model last
        self.pruned, self.branch = False, None  # the branches under way are one group, beside those of the samples
        self.visual_counts = prompt.visual.sum(1, keepdim=True).repeat(1, spec.num_layers)

    def prune(self, method: Reduction, vision: VisionAttention | None) -> None:
        """Traces the model with a method at work; branches are text alone, which no method drops."""
        self.pruned, self.vision = True, vision
        self.start(method)

    @property
    def _mains(self) -> list[Group]:
        """The samples as the model runs them; one group, but where a pruning parts them."""
        return [group for group in self.groups if group is not self.branch]

    def _predicting(self) -> torch.Tensor:
        """bool [batch, sequence], the tokens whose logits matter: those before the answer's; the last prompt token."""
        answer, last = self.prompt.answer, self.prompt.tail.index[:, -1:]
        column = torch.arange(self.length, device=last.device)
        if answer is None:
            return column == last
        if not bool(answer.any(1).all()):
            raise TraceError(_rows(~answer.any(1)), "no answer tokens: labels are -100 everywhere")
        predicts = F.pad(answer[:, 1:], (0, 1))
        if bool((predicts & (column < last)).any()):
            raise ValueError("labels stand before the end of the prompt: only the last answer can be traced")
        return predicts

    def _reduce(self, index: int) -> None:
        """After ``index`` layers: reads the text states, and lets a branch be born."""
        if index > 0:
            self.states.append(text_states(self._mains, self.prompt, self.spec))
        if self.pruned:
            mains = self.decisions.reduce(index, self._mains, self.attention, self.vision)
            self.groups = [*mains, *([self.branch] if self.branch is not None else [])]
            for group in mains:
                rows, counts = group.samples.to(self.visual_counts.device), group.visual.sum(1)
                self.visual_counts[rows, index] = counts.to(self.visual_counts.device)
        if index not in self.exits:
            return
        rows, branches = gather_columns(self._mains, self.text, self.length), 1
        if self.branch is not None:
            rows = torch.cat([self.branch.hidden.to(rows.device), rows])
            branches = len(rows) // self.batch
        samples = torch.arange(self.batch).repeat(branches)
        tokens = KeptTokens(self.text.index.repeat(branches, 1), self.text.valid.repeat(branches, 1), self.text.ragged)
        mains, self.branch = self._mains, Group(self.prompt, samples, tokens, rows, samples[:0], None)
        self.groups = [*mains, self.branch]

    def _full(self) -> torch.Tensor:
        """The rows that matter, for the model's own norm and head; too many of them are left for later."""
        self.states.append(text_states(self._mains, self.prompt, self.spec))
        dense = gather_columns(self._mains, self.reads, self.length)
        rows = [dense[None]]
        if self.branch is not None:
            branch = self.branch
            place = self.text.places(self.length).gather(1, self.reads.index)
            count = len(branch.hidden) // self.batch
            row = torch.arange(len(branch.hidden), device=branch.hidden.device)[:, None]
            read = branch.hidden[row, place.to(branch.hidden.device).repeat(count, 1)]
            rows.insert(0, read.unflatten(0, (count, self.batch)).to(dense.device))
        self.rows = torch.cat(rows)
        whole = self._few(self.rows)
        return self.rows.flatten(0, 1) if whole else dense[torch.arange(self.batch), self._first][:, None]

    def _check_finite(self, hidden: torch.Tensor) -> None:
        """States and logits are looked at when the trace is finished."""

    def _few(self, rows: torch.Tensor) -> bool:
        """Whether all logits are made at once; always so where other ranks, with other rows, share the head."""
        if not _has_head(self.spec.model) or shared_by_ranks(head := self.spec.model.get_output_embeddings()):
            return True
        vocabulary = head.weight.shape[0]
        return rows.shape[:-1].numel() * vocabulary * 4 <= LOGITS_AT_ONCE

    @property
    def _first(self) -> torch.Tensor:
        """long [batch], which read is at the last prompt token."""
        return (~self.reads.valid).sum(1)

    def finish(self, logits: torch.Tensor) -> Trace:
        """From logits of the model's own pass: all of them [(exits + 1) * batch, reads, vocabulary], or the first."""
        head = TraceHead(self.spec, self.rows, logits, self._first.to(logits.device), self.returns_tuple)
        layers = self.spec.num_layers
        agreement = torch.zeros(self.batch, layers, device=logits.device)
        nll, kl = torch.full_like(agreement, torch.nan), torch.full_like(agreement, torch.nan)
        for samples in head.parts():
            measured = self._measure(head, samples.to(logits.device))
            columns = torch.tensor([*self.exits, layers], device=logits.device) - 1
            for figure, values in zip((agreement, nll, kl), measured):
                figure[samples.to(logits.device)[:, None], columns] = values
        state = torch.stack([state.to(logits.device) for state in self.states], 1)
        if not bool(state.isfinite().all()):
            raise TraceError(_rows(~state.isfinite().flatten(1).all(1)), f"text states that are not finite: {_REMEDY}")
        if not bool(self.visual.isfinite().all()):
            raise TraceError(_rows(~self.visual.isfinite().all(1)), f"visual tokens that are not finite: {_REMEDY}")
        prompt = self.prompt
        text = prompt.text if prompt.answer is None else prompt.text & ~prompt.answer
        counts = [tokens.sum(1) for tokens in (text, prompt.visual)] + [self.visual_counts]
        counts = [count.to(logits.device) for count in counts]
        return Trace(state, self.visual.to(logits.device), agreement, nll, kl, nll[:, -1], *counts)

    def _measure(self, head: TraceHead, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Agreement, NLL and KL of some samples: float32 [n, exits + 1] each, the dense model last."""
        device = samples.device
        valid, first = self.reads.valid.to(device)[samples], self._first.to(device)[samples]
        row, count = torch.arange(len(samples), device=device), valid.sum(1)
        dense = head(len(self.rows) - 1, samples).log_softmax(-1)
        choice, dense_next = dense.argmax(-1), dense[row, first]
        targets = choice if self.targets is None else self.targets.to(device)[samples]
        targets = targets.where(valid, 0)
        choice = targets if self.pruned else choice

        def mean(values: torch.Tensor) -> torch.Tensor:
            return (values * valid).sum(1) / count

        agreement, nll, kl = [], [], []
        for branch, layer in enumerate([*self.exits, self.spec.num_layers]):
            log_p = dense if branch == len(self.rows) - 1 else head(branch, samples).log_softmax(-1)
            self._refuse_unfinite(log_p, valid, samples, layer)
            agreement.append(mean((log_p.argmax(-1) == choice).float()))
            nll.append(mean(-log_p.gather(-1, targets[..., None]).squeeze(-1)))
            divergence = F.kl_div(dense_next, log_p[row, first], reduction="none", log_target=True).sum(-1)
            kl.append(divergence.clamp(min=0))
            infinite = ~nll[-1].isfinite()
            if bool(infinite.any()):
                rows = samples[infinite].tolist()
                raise TraceError(rows, f"an answer of infinite loss with exit layer {layer}: {_REMEDY}")
        return torch.stack(agreement, 1), torch.stack(nll, 1), torch.stack(kl, 1)

    @staticmethod
    def _refuse_unfinite(log_p: torch.Tensor, valid: torch.Tensor, samples: torch.Tensor, layer: int) -> None:
        bad = (log_p.isnan().any(-1) & valid).any(1)
        if bool(bad.any()):
            raise TraceError(samples[bad].tolist(), f"logits that are NaN with exit layer {layer}: {_REMEDY}")


_REMEDY = "load the model in bfloat16 or float32 (float16 overflows in some models), or leave them out"


def refuse_without_image(fine: torch.Tensor) -> None:
    if not bool(fine.all()):
        raise TraceError(
            _rows(~fine),
            "no visual tokens, or no prompt text after them: an exit means nothing there, leave them out of the trace",
        )


def _has_head(model: nn.Module) -> bool:
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return getattr(head, "weight", None) is not None


def _rows(marked: torch.Tensor) -> list[int]:
    return marked.nonzero().flatten().tolist()
