"""One frozen pass per batch that teaches everything about its samples: text states, and what every exit would do.

After e layers, the text rows continue through the remaining layers alone, as a branch: that is what exiting at e does.
A branch is a group of the runtime; all branches under way run each layer together, in one batch of text-only rows, so
L labels cost a few dense forwards instead of L. The branches join the model's own last rows just before its final norm
and head.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from dyvte.runtime.calls import VisualMask
from dyvte.runtime.decoder import DecoderSpec, visual_tokens
from dyvte.runtime.engine import Engine
from dyvte.runtime.groups import Group
from dyvte.runtime.locate import without_engine
from dyvte.runtime.override import override
from dyvte.runtime.prefill import PromptPass
from dyvte.runtime.prompt import Prompt
from dyvte.runtime.splice import SplicedVisualMask
from dyvte.runtime.tokens import KeptTokens

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
    """

    state: torch.Tensor
    visual: torch.Tensor
    agreement: torch.Tensor
    nll: torch.Tensor
    kl: torch.Tensor
    dense_nll: torch.Tensor

    def to(self, device: str | torch.device) -> Trace:
        return Trace(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@torch.no_grad()
def trace_batch(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
    exits: int | Sequence[int] | None = None,
    **more: Any,
) -> Trace:
    """Traces a batch: one forward pass of the frozen model, with all exits as branches beside it.

    Args:
        model: any MLLM of transformers, or a decoder-only model fed with ``inputs_embeds``.
        inputs: what the model takes (peft's ``adapter_names`` too), padded on either side. For a given answer: the
            answer's tokens in the sequence and ``labels`` [batch, sequence], -100 everywhere else. Answer tokens never
            enter a text state. Without ``labels`` agreement and NLL are those of the dense model's next token.
        visual_mask: as in :func:`dyvte.attach`.
        decoder: as in :func:`dyvte.attach`.
        exits: which exit layers to trace: a stride k (every k-th layer that the model allows, and the last before L),
            or a list; all by default. A long text costs (L - 1) / 2 passes of the text for all exits, and 1 / k of
            that with a stride.

    Raises:
        ValueError: a sample without visual tokens, without text after them, labels before the last visual token, or
            states or logits that are not finite.
    """
    spec = DecoderSpec.of(model, decoder)
    traced = traced_exits(exits, spec)
    inputs = dict(inputs) | more
    labels = inputs.pop("labels", None)
    tokens = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if tokens is None:
        raise ValueError("inputs hold neither input_ids nor inputs_embeds: pass what the model's forward takes")
    if labels is not None and labels.shape != tokens.shape[:2]:
        raise ValueError(f"labels must be [batch, sequence] like the tokens {list(tokens.shape[:2])}, -100 off-answer")
    if visual_mask is None and inputs.get("input_ids") is not None:
        _refuse_without_image(visual_tokens(spec.model, inputs["input_ids"]).any(1))  # before images are encoded
    passes: list[TracePass] = []

    def begin(prompt: Prompt, hidden: torch.Tensor, cache: Any, past: torch.Tensor) -> TracePass:
        own = labels
        if own is not None and isinstance(visual_mask, SplicedVisualMask):
            own = visual_mask.expand(own, -100)
        return TracePass(spec, prompt, hidden, cache, past, own, traced)

    called = spec.model if inputs.get("adapter_names") is None else _adapted(model, spec)
    engine = Engine(spec, visual_mask, begin, passes.append)
    try:
        logits = called(**inputs, use_cache=False).logits
    finally:
        engine.remove()
    return passes[0].finish(logits)


def _adapted(model: nn.Module, spec: DecoderSpec) -> nn.Module:
    """The model within peft's wrapper, which gives every sample its adapter."""
    if hasattr(spec.model.get_output_embeddings(), "_mixed_batch_forward"):
        raise ValueError(
            "adapter_names cannot be traced where the language-model head has adapters of its own: trace the samples "
            "of each adapter by themselves, with set_adapter()"
        )
    return without_engine(model)


def traced_exits(exits: int | Sequence[int] | None, spec: DecoderSpec) -> list[int]:
    """The exit layers to trace, L left out: it is the dense model.

    Raises:
        ValueError: an exit layer that the model does not have or allow.
    """
    allowed = spec.exits
    if exits is None:
        return list(allowed)
    if isinstance(exits, int) and not isinstance(exits, bool) and exits >= 1:
        return sorted({*allowed[::exits], *allowed[-1:]})
    if isinstance(exits, Sequence) and all(isinstance(e, int) and not isinstance(e, bool) for e in exits):
        outside = [e for e in exits if e not in allowed and e != spec.num_layers]
        if exits and not outside:
            return sorted({*exits} - {spec.num_layers})
        raise ValueError(
            f"exits {outside or '[]'} cannot be traced: name exit layers {allowed.start} ... {allowed.stop - 1}"
        )
    raise ValueError(f"exits must be a stride of 1 or more, or a list of exit layers, not {exits!r}")


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
        prompt = Prompt.from_masks(prompt.visual, prompt.valid, answer)
        super().__init__(spec, prompt, hidden, cache, past)
        self.exits = exits
        _refuse_without_image(prompt.can_leave)
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
        main = self.groups[0]
        if index > 0:
            self.states.append(self.prompt.reader(self.spec.read(main.hidden)))
        if index not in self.exits:
            return
        rows, branches = self.text.gather(main.hidden), 1
        if len(self.groups) > 1:
            rows = torch.cat([self.groups[1].hidden.to(rows.device), rows])
            branches = len(rows) // self.batch
        samples = torch.arange(self.batch).repeat(branches)
        tokens = KeptTokens(self.text.index.repeat(branches, 1), self.text.valid.repeat(branches, 1), self.text.ragged)
        branch = Group(self.prompt, samples, tokens, rows, samples[:0], None)
        self.groups = [main, branch]

    def _full(self) -> torch.Tensor:
        """The rows that matter, for the model's own norm and head; too many of them are left for later."""
        main = self.groups[0]
        self.states.append(self.prompt.reader(self.spec.read(main.hidden)))
        dense = self.reads.gather(main.hidden)
        rows = [dense[None]]
        if len(self.groups) > 1:
            branch = self.groups[1]
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
        vocabulary = self.spec.model.get_output_embeddings().weight.shape[0] if _has_head(self.spec.model) else 0
        return rows.shape[:-1].numel() * vocabulary * 4 <= LOGITS_AT_ONCE

    @property
    def _first(self) -> torch.Tensor:
        """long [batch], which read is at the last prompt token."""
        return (~self.reads.valid).sum(1)

    def finish(self, logits: torch.Tensor) -> Trace:
        """From logits of the model's own pass: all of them [(exits + 1) * batch, reads, vocabulary], or the first."""
        valid = self.reads.valid.to(logits.device)
        first, sample = self._first.to(logits.device), torch.arange(self.batch, device=logits.device)
        count, branches = valid.sum(1), len(self.rows)
        head = _Head(self.spec, self.rows, logits, first, self.returns_tuple)
        dense = head(branches - 1).log_softmax(-1)
        choice, dense_next = dense.argmax(-1), dense[sample, first]
        targets = choice if self.targets is None else self.targets.to(logits.device)
        targets = targets.where(valid, 0)

        def mean(values: torch.Tensor) -> torch.Tensor:
            return (values * valid).sum(1) / count

        layers = self.spec.num_layers
        agreement = torch.zeros(self.batch, layers, device=logits.device)
        nll, kl = torch.full_like(agreement, torch.nan), torch.full_like(agreement, torch.nan)
        for branch, layer in enumerate([*self.exits, layers]):
            log_p = dense if branch == branches - 1 else head(branch).log_softmax(-1)
            self._refuse_unfinite(log_p, valid, layer)
            agreement[:, layer - 1] = mean((log_p.argmax(-1) == choice).float())
            nll[:, layer - 1] = mean(-log_p.gather(-1, targets[..., None]).squeeze(-1))
            divergence = F.kl_div(dense_next, log_p[sample, first], reduction="none", log_target=True).sum(-1)
            kl[:, layer - 1] = divergence.clamp(min=0)
            infinite = ~nll[:, layer - 1].isfinite()
            if bool(infinite.any()):
                raise TraceError(_rows(infinite), f"an answer of infinite loss with exit layer {layer}: {_REMEDY}")
        state = torch.stack([state.to(logits.device) for state in self.states], 1)
        if not bool(state.isfinite().all()):
            raise TraceError(_rows(~state.isfinite().flatten(1).all(1)), f"text states that are not finite: {_REMEDY}")
        if not bool(self.visual.isfinite().all()):
            raise TraceError(_rows(~self.visual.isfinite().all(1)), f"visual tokens that are not finite: {_REMEDY}")
        return Trace(state, self.visual.to(logits.device), agreement, nll, kl, nll[:, -1])

    @staticmethod
    def _refuse_unfinite(log_p: torch.Tensor, valid: torch.Tensor, layer: int) -> None:
        bad = log_p.isnan().any(-1) & valid
        if bool(bad.any()):
            raise TraceError(_rows(bad.any(1)), f"logits that are NaN with exit layer {layer}: {_REMEDY}")


class _Head:
    """Logits of the rows of a trace, branch by branch: those the model gave, or its head on a few rows at a time."""

    def __init__(
        self, spec: DecoderSpec, rows: torch.Tensor, logits: torch.Tensor, first: torch.Tensor, returns_tuple: bool
    ):
        self.model, self.layers, self.rows, self.returns_tuple = spec.model, spec.layers, rows, returns_tuple
        self.given = logits.unflatten(0, rows.shape[:2]) if len(logits) == rows.shape[:2].numel() else None
        if self.given is None:
            self._check(logits, first)

    def __call__(self, branch: int) -> torch.Tensor:
        """float32 [batch, reads, vocabulary]"""
        if self.given is not None:
            return self.given[branch].float()
        return torch.cat([self._run(rows[None]).float() for rows in self.rows[branch]])

    def _run(self, rows: torch.Tensor) -> torch.Tensor:
        """What the model makes of the output of its last layer: its layers are passed by."""

        def last(*args: Any, **kwargs: Any) -> Any:
            return (rows,) if self.returns_tuple else rows

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(override(layer, "forward", last))
            return self.model(inputs_embeds=rows, use_cache=False).logits

    def _check(self, logits: torch.Tensor, first: torch.Tensor) -> None:
        """The model's own logits at the last prompt token must come out again."""
        again = torch.stack([self._run(rows[None])[0, at] for rows, at in zip(self.rows[-1], first.tolist())])
        if not torch.allclose(again, logits[:, 0].to(again), atol=1e-2 * float(logits.abs().max()), rtol=0):
            raise ValueError(
                f"the head of {type(self.model).__name__} gives other logits for a few rows than in the whole pass, so "
                "a trace of this size cannot be read: trace fewer samples or answer tokens at once"
            )


_REMEDY = "load the model in bfloat16 or float32 (float16 overflows in some models), or leave them out"


def _refuse_without_image(fine: torch.Tensor) -> None:
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
