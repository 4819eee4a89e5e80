"""Where the attention of the text after an image goes: layer by layer to whom, and in one layer to which token."""

from __future__ import annotations

from collections.abc import Sequence
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
    spec = DecoderSpec.of(model, decoder)
    run = _read(spec, inputs, visual_mask, range(spec.num_layers), _SharesPass)
    return Shares(run.share, run.seen.sum(1).long().cpu())


@torch.no_grad()
def attention_map(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    layer: int,
    visual_mask: VisualMask | None = None,
    decoder: str | nn.Module | None = None,
) -> torch.Tensor:
    """What the text after the image attends to in one decoder layer, mean over its tokens and over heads.

    Args:
        model, inputs, visual_mask, decoder: as in :func:`attention_shares`.
        layer: 1 ... L, counted as exit layers are: the last layer that sees the image if it leaves there.

    Returns:
        float32 [batch, sequence], each row sums to 1

    Raises:
        ValueError: as :func:`attention_shares`, or there is no such layer.
    """
    spec = DecoderSpec.of(model, decoder)
    if not 1 <= layer <= spec.num_layers:
        raise ValueError(f"layer {layer} is outside 1 ... {spec.num_layers}")
    return _read(spec, inputs, visual_mask, [layer - 1], _MapPass).paid


def _read(
    spec: DecoderSpec,
    inputs: dict[str, torch.Tensor],
    visual_mask: VisualMask | None,
    layers: Sequence[int],
    reading: type[_ReadingPass],
) -> Any:
    """The model's dense pass over a batch of prompts, and what it read of these layers, counted from 0."""
    passes: list[_ReadingPass] = []

    def begin(prompt: Prompt, hidden: torch.Tensor, cache: Any, past: torch.Tensor) -> _ReadingPass:
        return reading(layers, spec, prompt, hidden, cache, past)

    engine = Engine(spec, visual_mask, begin, passes.append, attention_of=tuple(layers))
    try:
        spec.model(**{key: value for key, value in inputs.items() if key != "labels"}, use_cache=False)
    finally:
        engine.remove()
    return passes[0]


class _ReadingPass(PromptPass):
    """A dense pass that reads the attention of some layers."""

    def __init__(self, layers: Sequence[int], *arguments: Any):
        super().__init__(*arguments)
        self.layers, prompt = frozenset(layers), self.prompt
        if not bool(prompt.can_leave.all()):
            rows = (~prompt.can_leave).nonzero().flatten().tolist()
            raise ValueError(f"samples {rows} have no visual tokens, or no text after them: leave them out")
        column = torch.arange(self.length, device=prompt.visual.device)
        last_visual = torch.where(prompt.visual, column, -1).amax(1, keepdim=True)
        groups = [prompt.visual, prompt.text & (column < last_visual), prompt.text & (column > last_visual)]
        self.seen = torch.stack(groups, -1).float()  # [batch, sequence, 3]
        self.readers = (groups[2], column == prompt.tail.index[:, -1:])

    def _reduce(self, index: int) -> None:
        if index - 1 in self.layers:
            self._read(index - 1)

    def _full(self) -> torch.Tensor:
        if self.spec.num_layers - 1 in self.layers:
            self._read(self.spec.num_layers - 1)
        return super()._full()

    def _paid(self, queries: torch.Tensor) -> torch.Tensor:
        """What the marked tokens attended to in the layer before, their mean: float32 [batch, sequence]."""
        attention = self.attention[id(self.groups[0])]
        return attention.paid(queries).to(self.seen.device) / queries.sum(1, keepdim=True)

    def _read(self, layer: int) -> None:
        raise NotImplementedError


class _SharesPass(_ReadingPass):
    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        self.share = torch.zeros(self.batch, self.spec.num_layers, len(READERS), len(SEEN))

    def _read(self, layer: int) -> None:
        for reader, queries in enumerate(self.readers):
            self.share[:, layer, reader] = torch.einsum("bs,bsg->bg", self._paid(queries), self.seen).cpu()


class _MapPass(_ReadingPass):
    def _read(self, layer: int) -> None:
        self.paid = self._paid(self.readers[0]).cpu()
