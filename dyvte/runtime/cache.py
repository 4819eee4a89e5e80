"""Caches whose layers hold different tokens: the layer that remembers which, and what groups of samples share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from dyvte.runtime.compat import CROP_TAKES_LENGTH, EMPTY_LAYERS, PreTrainedConfig, causal_mask
from dyvte.runtime.kinds import LayerKind
from dyvte.runtime.masks import Mask, additive
from dyvte.runtime.tokens import KeptTokens


class KeptLayer(DynamicLayer):
    """The cache of an attention layer that holds some tokens only, and other ones for every sample.

    Keys and values are kept compact; ``tokens`` says which column of the full sequence each of the first places holds.
    Everything generated afterwards follows, one place per token. This is all the state that outlives a forward pass, so
    it goes wherever the cache goes: beam reordering, cropping by assisted decoding, several caches at a time.

    Attributes:
        tokens: the columns of the full sequence that are held, [batch, width].
        end: how many columns the full sequence has so far; what follows is kept in full.
        expected: whether the engine is at work; without its masks the layer would be read wrongly.
    """

    def __init__(self, tokens: KeptTokens, end: int):
        super().__init__()
        self.tokens, self.end, self.expected = tokens, end, False
        self._promised: tuple[KeptTokens, int] | None = None

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys, self.values, self.dtype, self.device = keys, values, keys.dtype, keys.device
        self.is_initialized = True

    def promise(self, tokens: KeptTokens, end: int) -> None:
        """What the layer will hold after its next update."""
        self._promised, self.expected = (tokens, end), True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.expected:
            raise ValueError(
                "this cache was filled under a visual exit and holds no visual tokens in some layers: continue it with "
                "the exit attached, or start a new cache"
            )
        self.expected = False
        states = super().update(key_states, value_states, *args, **kwargs)
        if self._promised is not None:
            (self.tokens, self.end), self._promised = self._promised, None
            if self.keys.shape[2] != self.tokens.width:
                raise ValueError(
                    f"a decoder layer cached {self.keys.shape[2]} tokens where {self.tokens.width} were kept: tokens "
                    "cannot be withdrawn from this model, use it without the exit"
                )
        return states

    def check_written(self, layer: int) -> None:
        """Raises ``ValueError`` if the decoder layer ran and did not write what was promised."""
        if self._promised is not None:
            raise ValueError(
                f"decoder layer {layer} ran without writing its cache: it keeps keys and values in a way that is not "
                "known here. Use the model without the exit"
            )

    @property
    def later(self) -> int:
        """How many of the places held follow the recorded tokens."""
        return self.keys.shape[2] - self.tokens.width

    def get_seq_length(self) -> int:
        """The length of the full sequence, as a sliding layer gives it: the model places new tokens and masks by it."""
        if self.is_initialized and self.keys.numel() > 0:
            return self.end + self.later
        return self.end if self._promised is not None else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Like its parent's; the columns removed must be held by every sample."""
        if tokens_to_remove < 0:
            remove = -tokens_to_remove
        else:
            remove = max(self.get_seq_length() - tokens_to_remove, 0) if CROP_TAKES_LENGTH else 0
        into = remove - self.later
        if into > 0:
            index = self.tokens.index
            last = torch.arange(self.end - into, self.end, device=index.device)
            if into >= index.shape[1] or not bool((index[:, -into:] == last).all()):
                raise ValueError(
                    f"the cache cannot be cropped by {remove} tokens: visual tokens among them are gone from some "
                    "layers. Start a new cache instead"
                )
            kept = KeptTokens(index[:, :-into], self.tokens.valid[:, :-into], self.tokens.ragged)
            self.tokens, self.end = kept, self.end - into
        if remove > 0:
            self.keys, self.values = self.keys[:, :, :-remove], self.values[:, :, :-remove]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.tokens = self.tokens.reordered(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        rows = torch.arange(len(self.tokens.index), device=self.tokens.index.device)
        self.tokens = self.tokens.rows(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.tokens = self.tokens.rows(indices)

    def columns(self, new: int = 0) -> torch.Tensor:
        """The column of the full sequence of each place, those of ``new`` incoming tokens included: [batch, places]."""
        index = self.tokens.index
        later = self.end + torch.arange(self.later + new, device=index.device)
        return torch.cat([index, later.expand(len(index), -1)], 1)

    def padding_mask(self, attention_mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
        """Which places, those of ``new`` incoming tokens included, hold a token: bool [batch, places], None for all.

        Args:
            attention_mask: [batch, full length], as the model got it; None where nothing is padding.
        """
        if attention_mask is None and not self.tokens.ragged:
            return None
        valid, later = self.tokens.valid, self.later + new
        if attention_mask is None or attention_mask.shape[1] != self.end + later:
            return torch.cat([valid, valid.new_ones(len(valid), later)], 1)
        shown = attention_mask.to(valid.device, torch.bool)
        # A call may hide tokens that an earlier one showed.
        return torch.cat([valid & shown.gather(1, self.tokens.index), shown[:, self.end :]], 1)

    def mask(
        self,
        config: PreTrainedConfig,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        kind: LayerKind,
        own: Mask,
    ) -> Mask:
        """The attention mask of this layer for the incoming tokens ``hidden`` [batch, new, d].

        Windows and chunks count columns of the full sequence, not places of the compact cache.

        Args:
            own: what the model made for this layer, as if its cache were not compact.
        """
        new, attention, spans = hidden.shape[1], config._attn_implementation, kind.span is not None
        # A single token sees all that is held. The general way would ask the device whether anything is padding, once
        # for every set of tokens, at every step; where the model made no mask, it has asked.
        if new == 1 and not spans and not self.tokens.ragged and own is None and attention == "sdpa":
            return None
        padding = self.padding_mask(attention_mask, new)
        if new == 1 and not spans and self.tokens.ragged and attention in ("sdpa", "eager"):
            allowed = padding[:, None, None, :].to(hidden.device)
            return allowed if attention == "sdpa" else additive(allowed, hidden.dtype)
        places = DynamicLayer()
        places.keys, places.values, places.is_initialized = self.keys, self.values, True
        return causal_mask(config, hidden, padding, Cache(layers=[places]), self._reach(kind, new, padding, hidden))

    def _reach(
        self, kind: LayerKind, new: int, padding: torch.Tensor | None, hidden: torch.Tensor
    ) -> Callable[..., Any] | None:
        """The condition of a window or chunk on (batch, head, query, key), where there is one."""
        if kind.span is None:
            return None
        column = self.columns(new).to(hidden.device)
        start = torch.zeros(len(column), dtype=torch.long, device=hidden.device)
        if padding is not None:
            start = torch.where(padding.to(hidden.device), column, column[:, -1:]).amin(1)

        def reaches(batch: Any, head: Any, query: Any, key: Any) -> Any:
            return kind.reaches(column[batch, query], column[batch, key], start[batch])

        return reaches


def check_cache(cache: Any) -> None:
    """Raises ``ValueError`` for a cache whose layers cannot hold different tokens."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer, KeptLayer, *EMPTY_LAYERS)
    layers = getattr(cache, "layers", ())
    plain = isinstance(cache, Cache) and all(type(layer) in kinds or is_recurrent(layer) for layer in layers)
    if not plain or getattr(cache, "offloading", False) or getattr(cache, "is_compileable", False):
        raise ValueError(
            f"a {type(cache).__name__} cannot hold fewer tokens in some layers than in others: use a DynamicCache "
            "(the default of generate), without offloading"
        )


def is_recurrent(layer: Any) -> bool:
    """Whether a cache layer holds the state of linear attention, and no keys."""
    return hasattr(layer, "conv_states") and not isinstance(layer, DynamicLayer)


def held_tokens(layer: CacheLayerMixin, valid: torch.Tensor) -> KeptTokens:
    """Which columns of the sequence so far a filled cache layer holds.

    Args:
        valid: bool [batch, columns so far]; what is not padding.
    """
    if isinstance(layer, KeptLayer):
        index, known = layer.columns().to(valid.device), layer.tokens.valid.to(valid.device)
        held = valid.gather(1, index)
        held[:, : known.shape[1]] &= known
    else:
        past, kept = valid.shape[1], layer.keys.shape[2]
        index = torch.arange(past - kept, past, device=valid.device).expand(len(valid), -1)
        held = valid[:, past - kept :]
    return KeptTokens(index, held, ragged=not bool(held.all()))
