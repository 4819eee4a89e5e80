"""What a decoder layer is given once rows are gone: fewer rows, their original positions, masks, a shorter cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import create_causal_mask

from dyvte.tokens import Columns

Mask = Any  # bool or float [batch, 1, query, key], bool [batch, key], a flex BlockMask, or None


def sliding_window(layer: nn.Module, config: PreTrainedConfig, index: int) -> int | None:
    """The attention window of a decoder layer in tokens, or None where it attends to everything before."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return config.sliding_window if types[index] == "sliding_attention" else None
    return getattr(getattr(layer, "self_attn", None), "sliding_window", None)


class WithdrawnLayer(DynamicLayer):
    """The cache of a layer that holds no visual tokens for some samples.

    Keys and values are kept compact; ``columns`` says which column of the full prompt each of the first places holds.
    Everything generated afterwards follows, one place per token. This is all the state that outlives a forward pass,
    so it goes wherever the cache goes: beam reordering, cropping by assisted decoding, several caches at a time.

    Args:
        columns: the columns of the prompt that are kept, [batch, width].
        prompt_length: how many columns the full prompt has.
    """

    def __init__(self, columns: Columns, prompt_length: int):
        super().__init__()
        self.columns, self.prompt_length = columns, prompt_length

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        # Beams of one sample share their prompt, and reordering never crosses samples: columns stay as they are.
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.columns = self.columns.rows(torch.arange(len(self.columns.index)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.columns = self.columns.rows(indices)

    def padding_mask(self, attention_mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
        """Which places, those of ``new`` incoming tokens included, hold a token: bool [batch, places], None for all.

        Args:
            attention_mask: [batch, full length], as the model got it; None where nothing is padding.
        """
        generated = self.get_seq_length() - self.columns.index.shape[1] + new
        later = None if attention_mask is None else attention_mask[:, self.prompt_length :].bool()
        if later is None and not self.columns.ragged:
            return None
        valid = self.columns.valid
        if later is None or later.shape[1] != generated:
            later = valid.new_ones(len(valid), generated)
        return torch.cat([valid, later.to(valid.device)], 1)

    def mask(
        self, config: PreTrainedConfig, hidden: torch.Tensor, attention_mask: torch.Tensor | None, window: int | None
    ) -> Mask:
        """The attention mask of this layer for the incoming tokens ``hidden`` [batch, new, d].

        The window of a sliding layer counts positions of the full sequence, not places of the compact cache.
        """
        new = hidden.shape[1]
        padding = self.padding_mask(attention_mask, new)
        in_window = None
        if window is not None:
            generated = self.get_seq_length() - self.columns.index.shape[1] + new
            later = self.prompt_length + torch.arange(generated, device=hidden.device)
            index = self.columns.index.to(hidden.device)
            position = torch.cat([index, later.expand(len(index), -1)], 1)

            def in_window(batch: Any, head: Any, query: Any, key: Any) -> Any:
                return position[batch, key] > position[batch, query] - window

        cache = Cache(layers=[self])
        return create_causal_mask(
            config, hidden, padding, past_key_values=cache, and_mask_function=in_window, layer_idx=0
        )


def compact_mask(mask: Mask, columns: Columns, config: PreTrainedConfig, hidden: torch.Tensor) -> Mask:
    """The mask of a layer's prompt for compacted rows, from the one that the model made for all of them.

    Where the model gave a mask, its rows and columns are selected, so whatever structure it has is kept (windows,
    prefixes that attend both ways). Where it gave none, attention is causal, and only raggedness needs one.

    Args:
        mask: as handed to the layer for full rows, for the samples of ``columns`` only or for a batch of one.
        columns: what is kept.
        hidden: the compacted hidden states [n, width, d].
    """
    index, valid = columns.index.to(hidden.device), columns.valid.to(hidden.device)
    if isinstance(mask, torch.Tensor) and mask.ndim == 4:
        row = torch.arange(len(index), device=mask.device)[:, None, None]
        heads = mask.expand(len(index), -1, -1, -1)
        compact = heads[row, :, index[:, :, None], index[:, None, :]].permute(0, 3, 1, 2)
        if columns.ragged:
            hidden_key = ~valid[:, None, None, :]
            blocked = False if compact.dtype == torch.bool else torch.finfo(compact.dtype).min
            compact = compact.masked_fill(hidden_key, blocked)
        return compact
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return columns.take(mask).to(mask.dtype) * valid.to(mask.dtype)
    return create_causal_mask(config, hidden, valid if columns.ragged else None, past_key_values=None)


def select_rows(value: Any, rows: torch.Tensor, batch: int) -> Any:
    """The rows of a batch in whatever a layer is given; anything without a batch dimension stays as it is."""
    if isinstance(value, torch.Tensor):
        dim = 1 if value.ndim == 3 and value.shape[0] in (3, 4) and value.shape[1] == batch != value.shape[0] else 0
        if value.ndim >= 2 and value.shape[dim] == batch and batch > 1:
            return value.index_select(dim, rows.to(value.device))
        return value
    if isinstance(value, tuple):
        return tuple(select_rows(part, rows, batch) for part in value)
    if isinstance(value, Mapping):
        return {key: select_rows(part, rows, batch) for key, part in value.items()}
    return value


def compact_arguments(arguments: Mapping[str, Any], columns: Columns, length: int) -> dict[str, Any]:
    """A layer's keyword arguments for compacted rows: positions stay with their tokens.

    ``attention_mask`` and ``past_key_values`` are the caller's to set.

    Args:
        arguments: those of the full rows of the same samples.
        length: how many columns the full rows have.
    """

    def take(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim >= 2 and value.shape[1] == length:
            if len(value) in (1, len(columns.index)):
                return columns.take(value)
        if isinstance(value, tuple):
            return tuple(take(part) for part in value)
        if isinstance(value, Mapping):
            return {key: take(part) for key, part in value.items()}
        return value

    compact = {key: take(value) for key, value in arguments.items()}
    if arguments.get("position_embeddings") is not None:
        # Rotations are applied already; gaps in position ids would read as several packed sequences.
        compact["position_ids"] = None
    return compact
