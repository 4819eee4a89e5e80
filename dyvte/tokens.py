"""Where the decoder layers and the visual tokens of a model are.

Everything here asks the model or its config; nothing is a table of architectures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

VISUAL_ID_NAMES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")
DECODER_NAMES = ("language_model", "text_model", "llm", "decoder", "model")


def underlying_model(model: nn.Module) -> nn.Module:
    """The model whose ``forward`` runs: inside a peft wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def find_decoder(model: nn.Module) -> nn.Module:
    """The module that owns the list of decoder layers.

    Asks ``model.get_decoder()`` and, since that may return a wrapper, goes on inwards until there is a ``.layers``.

    Raises:
        ValueError: no module with ``.layers`` is found.
    """
    module = model.get_decoder() if hasattr(model, "get_decoder") else model
    for start in (module, model):
        seen: set[int] = set()
        while start is not None and id(start) not in seen:
            if isinstance(getattr(start, "layers", None), nn.ModuleList) and len(start.layers) > 0:
                return start
            seen.add(id(start))
            inner = (getattr(start, name, None) for name in DECODER_NAMES)
            start = next((m for m in inner if isinstance(m, nn.Module) and id(m) not in seen), None)
    raise ValueError(
        f"no decoder layers found in {type(model).__name__}: neither get_decoder() nor "
        f"{', '.join('.' + name for name in DECODER_NAMES)} lead to a module with a ModuleList .layers"
    )


def visual_token_ids(model: nn.Module) -> list[int]:
    """The ids that stand for visual tokens in ``input_ids``, as the model's config names them (images and videos).

    Raises:
        ValueError: the config names none.
    """
    config = getattr(model, "config", None)
    ids = {getattr(config, name, None) for name in VISUAL_ID_NAMES}
    ids = sorted(i for i in ids if isinstance(i, int) and i >= 0)
    if not ids:
        raise ValueError(
            f"the config of {type(model).__name__} names no visual token id ({', '.join(VISUAL_ID_NAMES)}): "
            "pass visual_mask, a bool tensor [batch, sequence] that is True at the visual tokens"
        )
    return ids


@dataclass(frozen=True)
class Columns:
    """Some columns of a [batch, sequence] grid, compacted to the right.

    Attributes:
        index: long [batch, width], the column each compact place comes from; distinct within a row.
        valid: bool [batch, width]; False on the left of rows that keep fewer columns than ``width``.
        ragged: whether any place is not valid.
    """

    index: torch.Tensor
    valid: torch.Tensor
    ragged: bool

    @classmethod
    def of(cls, keep: torch.Tensor) -> Columns:
        """Columns where ``keep`` (bool [batch, sequence]) is True, in order; at least one place wide."""
        counts = keep.sum(1)
        width, fewest = max(int(counts.max()), 1), int(counts.min())
        index = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, -width:]
        return cls(index, keep.gather(1, index), ragged=fewest < width)

    def rows(self, rows: torch.Tensor) -> Columns:
        """The same columns for some rows of the batch."""
        return Columns(self.index[rows], self.valid[rows], self.ragged)

    def take(self, grid: torch.Tensor) -> torch.Tensor:
        """[batch or 1, sequence, ...] -> [batch, width, ...]."""
        index = self.index.to(grid.device)
        if len(grid) == 1:
            return grid[0][index]
        return grid[torch.arange(len(index), device=grid.device)[:, None], index]


@dataclass(frozen=True)
class Prompt:
    """The tokens of a batch of prompts.

    Attributes:
        visual: bool [batch, sequence], the visual tokens.
        text: bool [batch, sequence], everything else that is not padding (answers, when traced, included).
        tail: the text tokens of the prompt after its last visual token; the last one is the last prompt token.
        can_leave: bool [batch] on the CPU; False where there is nothing to withdraw (no visual token) or where the
            prompt ends in a visual token, whose own output is needed.
    """

    visual: torch.Tensor
    text: torch.Tensor
    tail: Columns
    can_leave: torch.Tensor

    @classmethod
    def of(cls, visual: torch.Tensor, valid: torch.Tensor, answer: torch.Tensor | None = None) -> Prompt:
        """From bool [batch, sequence] masks: the visual tokens, the tokens that are not padding, the answer's."""
        visual, text = visual & valid, ~visual & valid
        column = torch.arange(visual.shape[1], device=visual.device)
        last_visual = torch.where(visual, column, -1).amax(1, keepdim=True)
        tail = text & (column > last_visual)
        if answer is not None:
            tail &= ~answer
        can_leave = visual.any(1) & tail.any(1)
        return cls(visual, text, Columns.of(tail), can_leave.cpu())

    def text_state(self, hidden: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The text state of each sample, from the output of a decoder layer before the final norm.

        [mean of the text tokens after the last visual token, but for the last one; last prompt token], the recipe of
        DyVTE (arXiv 2411.19628). With a single text token there the mean has nothing to average: it is that token.

        Args:
            hidden: [batch, sequence, d]; only the rows ``rows`` of the batch, where given.

        Returns:
            float32 [batch, 2 * d]
        """
        tail = self.tail if rows is None else self.tail.rows(rows)
        states, valid = tail.take(hidden).float(), tail.valid[:, :-1, None].to(hidden.device)
        last, rest = states[:, -1], states[:, :-1]
        count = valid.sum(1)
        mean = torch.where(count > 0, rest.masked_fill(~valid, 0).sum(1) / count.clamp(min=1), last)
        return torch.cat([mean, last], -1)
