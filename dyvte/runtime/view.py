"""What a method sees when it is asked, between two layers."""

from __future__ import annotations

import torch

from dyvte.runtime.attention import AttentionCall
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.groups import Group
from dyvte.runtime.prompt import Prompt
from dyvte.runtime.tokens import KeptTokens
from dyvte.runtime.vision import VisionAttention


class LayerView:
    """What a reduction sees between two layers: some samples, with the tokens that they still have.

    Attributes:
        layer: the decoder layer from which on the answer counts, from 0; the layers before it have seen these tokens,
            but for the ``lookahead`` last of them.
        samples: long [n] on the CPU, rows of the batch.
        prompt: the prompts of the whole batch.
        spec: the model.
        finite: bool [n], whether the text state was finite; None until it is read.
    """

    def __init__(
        self,
        group: Group,
        places: torch.Tensor,
        layer: int,
        spec: DecoderSpec,
        attention: AttentionCall | None = None,
        vision: VisionAttention | None = None,
    ):
        self.group, self.places, self.layer, self.spec = group, places, layer, spec
        self.prompt: Prompt = group.prompt
        self.samples = group.samples[places]
        self.finite: torch.Tensor | None = None
        self._attention, self._vision = attention, vision
        self._everyone = len(places) == len(group.samples)

    def _rows(self, grid: torch.Tensor) -> torch.Tensor:
        return grid if self._everyone else grid[self.places.to(grid.device)]

    @property
    def shape(self) -> tuple[int, int]:
        """(n, width)"""
        return len(self.places), self.group.tokens.width

    @property
    def hidden(self) -> torch.Tensor:
        """[n, width, d], the states after the layers so far, before any final norm."""
        return self._rows(self.spec.read(self.group.hidden))

    @property
    def tokens(self) -> KeptTokens:
        """[n, width], the column of the prompt in each place."""
        return self.group.tokens if self._everyone else self.group.tokens.rows(self.places)

    @property
    def visual(self) -> torch.Tensor:
        """bool [n, width], the visual tokens."""
        return self._rows(self.group.visual)

    @property
    def total(self) -> torch.Tensor:
        """long [n], how many visual tokens each prompt has."""
        visual = self.prompt.visual
        return visual[self.samples.to(visual.device)].sum(1)

    def text_state(self) -> torch.Tensor:
        """float32 [n, 2d], see :class:`~dyvte.runtime.prompt.TextReader`."""
        state = self.group.reader(self.places)(self.spec.read(self.group.hidden))
        self.finite = state.sum(1).isfinite()
        return state

    def last_token(self) -> torch.Tensor:
        """bool [n, width], the last token of each prompt."""
        tail, tokens = self.prompt.tail, self.tokens
        last = tail.index[self.samples.to(tail.index.device), -1:].to(tokens.index.device)
        return (tokens.index == last) & tokens.valid

    def words(self) -> torch.Tensor:
        """bool [n, width], the text tokens of each prompt, answers left out."""
        prompt = self.prompt
        text = prompt.text if prompt.answer is None else prompt.text & ~prompt.answer
        return self.tokens.gather(text, self.samples) & self.tokens.valid.to(text.device)

    def after_image(self) -> torch.Tensor:
        """bool [n, width], the text tokens of each prompt after its last visual token, answers left out."""
        tail = self.prompt.tail
        grid = torch.zeros_like(self.prompt.visual)
        grid.scatter_(1, tail.index.to(grid.device), tail.valid.to(grid.device))
        return self.tokens.gather(grid, self.samples) & self.tokens.valid.to(grid.device)

    def attention_from(self, queries: torch.Tensor) -> torch.Tensor:
        """What some tokens attend to in the last layer that ran: float32 [n, width].

        Mean over heads, summed over the queries. Only for reductions with ``reads_attention``.

        Args:
            queries: bool [n, width].
        """
        if self._attention is None:
            raise ValueError("attention is kept for reductions that say reads_attention = True, and only for them")
        everyone = torch.zeros_like(self.group.tokens.valid)
        everyone[self.places.to(everyone.device)] = queries
        return self._rows(self._attention.paid(everyone))

    @property
    def vision(self) -> VisionAttention:
        """The attention of the vision tower. Only for reductions with ``reads_vision``."""
        if self._vision is None:
            raise ValueError("the vision tower is read for reductions that say reads_vision, and only for them")
        return self._vision

    def of_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """Values of the tower's patches at their visual tokens: [images, patches] -> [n, width], zero elsewhere."""
        return self.vision.to_tokens(patches, self.prompt.visual, self.tokens, self.samples)
