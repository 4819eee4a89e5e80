"""Where the attention of the text after an image goes, in every decoder layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dyvte.runtime.calls import VisualMask
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.engine import Engine
from dyvte.runtime.prefill import PromptPass
from dyvte.runtime.prompt import Prompt

SEEN = ("visual", "prompt", "text")
READERS = ("text", "last")


@dataclass
class Shares:
    """Where attention goes in every decoder layer, averaged over heads.

    Attributes:
        share: float32 [batch, L, 2, 3]; the readers are the text tokens after the image (mean) and the last one of
            them alone, and they see visual tokens, the prompt's text before them, and text after them. Sums to 1.
        tokens: long [batch, 3], how many tokens there are of each.
    """

    share: torch.Tensor
    tokens: torch.Tensor


@torch.no_grad()
def attention_shares(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
) -> Shares:
    """How much attention the text after the image pays to whom, in one forward pass over a batch of prompts.

    "After the image" is after the last visual token; text between two images counts as before. The model keeps its
    attention implementation; the rows of the text tokens are computed a second time, head group by head group, and
    reduced at once.

    Args:
        model: any MLLM of transformers, or a decoder-only model fed with ``inputs_embeds``.
        inputs: what the model takes, padded on either side.
        visual_mask: as in :func:`dyvte.attach`.
        decoder: as in :func:`dyvte.attach`.

    Raises:
        ValueError: a sample without visual tokens or without text after them, or attention that cannot be read.
    """
    spec, passes = DecoderSpec.of(model, decoder), []

    def begin(prompt: Prompt, hidden: torch.Tensor, cache: Any, past: torch.Tensor) -> _SharesPass:
        return _SharesPass(spec, prompt, hidden, cache, past)

    engine = Engine(spec, visual_mask, begin, passes.append, attention_of=tuple(range(spec.num_layers)))
    try:
        spec.model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
    finally:
        engine.remove()
    return Shares(passes[0].share, passes[0].seen.sum(1).long().cpu())


class _SharesPass(PromptPass):
    """A dense pass that reads the attention of every layer."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        prompt = self.prompt
        if not bool(prompt.can_leave.all()):
            rows = (~prompt.can_leave).nonzero().flatten().tolist()
            raise ValueError(f"samples {rows} have no visual tokens, or no text after them: leave them out")
        column = torch.arange(self.length, device=prompt.visual.device)
        last_visual = torch.where(prompt.visual, column, -1).amax(1, keepdim=True)
        groups = [prompt.visual, prompt.text & (column < last_visual), prompt.text & (column > last_visual)]
        self.seen = torch.stack(groups, -1).float()  # [batch, sequence, 3]
        self.readers = (groups[2], column == prompt.tail.index[:, -1:])
        self.share = torch.zeros(self.batch, self.spec.num_layers, len(READERS), len(SEEN))

    def _reduce(self, index: int) -> None:
        if index > 0:
            self._read(index - 1)

    def _full(self) -> torch.Tensor:
        self._read(self.spec.num_layers - 1)
        return super()._full()

    def _read(self, layer: int) -> None:
        attention = self.attention[id(self.groups[0])]
        for reader, queries in enumerate(self.readers):
            paid = attention.paid(queries).to(self.seen.device) / queries.sum(1, keepdim=True)
            self.share[:, layer, reader] = torch.einsum("bs,bsg->bg", paid, self.seen).cpu()
