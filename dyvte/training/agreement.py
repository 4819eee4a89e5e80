"""Whether a method leaves an answer as it is, from one pass over prompt and dense answer (teacher forcing).

Greedy decoding with the method gives the dense answer exactly if, with that answer as its past, the most likely token
is the next one of it everywhere. So no method has to be decoded with to know whether it changes an answer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dyvte.runtime.arguments import argument_names
from dyvte.runtime.calls import VisualMask
from dyvte.runtime.handle import Handle
from dyvte.runtime.prefill import PromptPass
from dyvte.runtime.prompt import Prompt
from dyvte.runtime.reduction import Reduction
from dyvte.runtime.splice import SplicedVisualMask
from dyvte.training.tracer import answer_mask, append_answer, greedy_answers


@torch.no_grad()
def dense_answers(model: nn.Module, inputs: dict[str, Any], max_new_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own greedy answers: ids, and which of them belong to the answer; long and bool [batch, length]."""
    ids = greedy_answers(model, inputs, max_new_tokens, together=False)
    return ids, answer_mask(ids, model.generation_config.eos_token_id)


@torch.no_grad()
def keeps_answers(
    model: nn.Module,
    method: Reduction,
    inputs: dict[str, Any],
    ids: torch.Tensor,
    answer: torch.Tensor,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether greedy decoding with a method gives the same answers, and how much of the visual work it leaves out.

    The answers take no part in what the method decides: it sees the prompts alone, as when it decodes. Tokens that the
    model's generation config suppresses are not candidates here either.

    Args:
        inputs: what the model takes for the prompts, padded on the left.
        ids, answer: see :func:`dense_answers`.
        visual_mask, decoder: see :func:`dyvte.attach`.

    Returns:
        bool [batch] and float64 [batch], the share of each prompt's visual-token layers that are left out.
    """
    logits, labels, handle = teacher_forced(model, method, inputs, ids, answer, visual_mask, decoder)
    suppressed = getattr(model.generation_config, "suppress_tokens", None)
    if suppressed:
        logits = logits.index_fill(-1, torch.tensor(suppressed, device=logits.device), -torch.inf)
    same = ((logits[:, :-1].argmax(-1) == labels) | (labels == -100)).all(1)
    record = handle.record[-1]
    places = record.visual.double() * handle.num_layers
    return same.cpu(), 1 - record.counts.sum(0) / places.clamp(min=1)


def teacher_forced(
    model: nn.Module,
    method: Reduction,
    inputs: dict[str, Any],
    ids: torch.Tensor,
    answer: torch.Tensor,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
) -> tuple[torch.Tensor, torch.Tensor, TeacherForced]:
    """One pass over prompts and answers, see :func:`keeps_answers`; also for training, with gradients.

    Returns:
        logits [batch, n, vocabulary], of which all but the last predict the labels [batch, n - 1] (-100 off-answer),
        and what the method did.
    """
    given = append_answer(inputs, ids, answer)
    handle = TeacherForced(model, method, given.pop("labels"), visual_mask, decoder)
    fewer = {}
    if "logits_to_keep" in argument_names(handle.spec.model) and not isinstance(visual_mask, SplicedVisualMask):
        fewer = {"logits_to_keep": ids.shape[1] + 1}
    try:
        logits = handle.spec.model(**given, use_cache=False, **fewer).logits
    finally:
        handle.detach()
    return logits, handle.labels[:, -logits.shape[1] :][:, 1:].to(logits.device), handle


class TeacherForced(Handle):
    """A method at work on prompts that come with their answers.

    Args:
        labels: long [batch, sequence], -100 off-answer.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Reduction,
        labels: torch.Tensor,
        visual_mask: VisualMask | None = None,
        decoder: str | nn.Module | None = None,
    ):
        self.labels, self._visual_mask = labels, visual_mask
        super().__init__(model, method, visual_mask, decoder)

    def _begin(self, prompt: Prompt, hidden: torch.Tensor, cache: Any, past: torch.Tensor) -> PromptPass:
        if isinstance(self._visual_mask, SplicedVisualMask):
            self.labels = self._visual_mask.expand(self.labels, -100)  # the sequence that the decoder sees is longer
        answer = (self.labels.to(prompt.visual.device) != -100) & prompt.valid
        prompt = Prompt.from_masks(prompt.visual, prompt.valid, answer, prompt.ids, prompt.copies)
        return super()._begin(prompt, hidden, cache, past)
