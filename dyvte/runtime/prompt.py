"""The tokens of a batch of prompts: which are visual, which are text, which are padding; and how text states are read.

This is worked out in one place, for exits, traces, inspection and evaluation alike.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from dyvte.runtime.tokens import KeptTokens, full_precision


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts as the decoder sees them.

    Attributes:
        visual: bool [batch, sequence], the visual tokens.
        text: bool [batch, sequence], everything else that is not padding (answers, when traced, included).
        answer: bool [batch, sequence], text that follows the prompt and has no say in a decision; None for none.
        tail: the text tokens of the prompt after its last visual token; the last one is the last prompt token.
        can_leave: bool [batch] on the CPU; False where there is nothing to withdraw (no visual token) or where the
            prompt ends in a visual token, whose own output is needed.
        ids: long [batch, sequence], where the model got ids of that length.
        copies: how many rows in succession belong to one sample (beams, ``num_return_sequences``).
    """

    visual: torch.Tensor
    text: torch.Tensor
    answer: torch.Tensor | None
    tail: KeptTokens
    can_leave: torch.Tensor
    ids: torch.Tensor | None = None
    copies: int = 1

    @classmethod
    def from_masks(
        cls,
        visual: torch.Tensor,
        valid: torch.Tensor,
        answer: torch.Tensor | None = None,
        ids: torch.Tensor | None = None,
        copies: int = 1,
    ) -> Prompt:
        """From bool [batch, sequence] masks: the visual tokens, the tokens that are not padding, the answer's."""
        visual, text = visual & valid, ~visual & valid
        column = torch.arange(visual.shape[1], device=visual.device)
        last_visual = torch.where(visual, column, -1).amax(1, keepdim=True)
        tail = text & (column > last_visual)
        if answer is not None:
            tail &= ~answer
        can_leave = (visual.any(1) & tail.any(1)).cpu()
        return cls(visual, text, answer, KeptTokens.from_mask(tail), can_leave, ids, copies)

    @property
    def shape(self) -> tuple[int, int]:
        """(batch, sequence)"""
        return tuple(self.visual.shape)

    @functools.cached_property
    def valid(self) -> torch.Tensor:
        """bool [batch, sequence], what is not padding."""
        return self.visual | self.text

    @functools.cached_property
    def staying(self) -> torch.Tensor:
        """bool [batch, sequence], what every layer runs on in any case.

        The text, and the last column even where it is padding: ``generate`` reads the next token there.
        """
        staying = self.text.clone()
        staying[:, -1] |= ~self.visual[:, -1]
        if self.answer is not None:  # guesses follow the prompt, and its own last column is read, too
            staying[:, :-1] |= self.answer[:, 1:] & ~self.answer[:, :-1] & ~self.visual[:, :-1]
        return staying

    def visual_state(self, embeddings: torch.Tensor) -> torch.Tensor:
        """The mean visual token of each sample as they enter the decoder: [batch, sequence, d] -> float32 [batch, d].

        Zeros where there are none.
        """
        weights = self.visual / self.visual.sum(1, keepdim=True).clamp(min=1)
        return torch.einsum("bs,bsd->bd", weights.to(embeddings), embeddings).float()

    @functools.cached_property
    def reader(self) -> TextReader:
        """Reads the text states of the whole batch."""
        batch, length = self.shape
        return TextReader(self.tail, torch.arange(batch, device=self.visual.device), length, whole=True)


class TextReader:
    """Reads text states off the output of a decoder layer, before the final norm.

    [mean of the text tokens after the last visual token, but for the last one; last prompt token], the recipe of DyVTE
    (arXiv 2411.19628). With a single text token there the mean has nothing to average: it is that token. Where to look
    is worked out once, so that a layer costs one gather of those tokens and one product.

    Args:
        tail: see :class:`Prompt`, for the samples to read; its index says where they are in the hidden states.
        row: long [n], the row of the hidden states that each of them is in.
        width: of the hidden states.
        whole: whether these are all of their rows, in order.
    """

    def __init__(self, tail: KeptTokens, row: torch.Tensor, width: int, whole: bool):
        index, valid = tail.index, tail.valid
        # Places that hold nothing look at the last token, with no weight.
        self.place = torch.where(valid, index, index[:, -1:])
        self.row = row[:, None].expand_as(index)
        rest, last = valid.float(), torch.zeros_like(valid, dtype=torch.float)
        last[:, -1], rest[:, -1] = 1, 0
        count = rest.sum(1, keepdim=True)
        mean = torch.where(count > 0, rest / count.clamp(min=1), last)
        self.weights = torch.stack([mean, last], 1)
        # Where the same number of tokens ends every sequence, as in a batch of one, they are a view and not a copy.
        end = torch.arange(width - index.shape[1], width, device=index.device)
        self.at_end = whole and bool((valid & (index == end)).all())

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, width, d] -> float32 [n, 2 * d]"""
        if self.weights.device != hidden.device:
            self.place, self.row, self.weights = (t.to(hidden.device) for t in (self.place, self.row, self.weights))
        tokens = hidden[:, -self.weights.shape[2] :] if self.at_end else hidden[self.row, self.place]
        with full_precision(hidden.device):
            return torch.bmm(self.weights, tokens.float()).flatten(1)
