"""What a decoder layer is given once rows are gone: fewer rows, their original positions, masks, a shorter cache."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, get_layer_types_and_kwargs
from transformers.masking_utils import create_causal_mask

from dyvte.runtime.tokens import Columns

Mask = Any  # bool or float [batch, 1, query, key], bool [batch, key], a flex BlockMask, or None


def sliding_windows(config: PreTrainedConfig, num_layers: int) -> list[int | None]:
    """The attention window of every decoder layer in tokens, None where it attends to everything before.

    Raises:
        ValueError: a layer is of a kind from which tokens cannot be withdrawn.
    """
    types, arguments = get_layer_types_and_kwargs(config)
    windows: list[int | None] = [None] * num_layers
    for index, (kind, settings) in enumerate(zip(types[:num_layers], arguments)):
        if kind not in ("full_attention", "sliding_attention"):
            why = {
                "linear_attention": "its state mixes all tokens before, so none can be taken out of it",
                "dummy": "it has no keys and values of its own",
            }.get(kind, "only full and sliding attention are supported")
            raise ValueError(
                f"decoder layer {index} is a {kind!r} layer, and visual tokens cannot be withdrawn from it: {why}. "
                "Use a model whose decoder layers are all full_attention or sliding_attention"
            )
        windows[index] = settings.get("sliding_window")
    return windows


class WithdrawnLayer(DynamicLayer):
    """The cache of a layer that holds no visual tokens for some samples.

    Keys and values are kept compact; ``columns`` says which column of the full sequence each of the first places
    holds. Everything generated afterwards follows, one place per token. This is all the state that outlives a forward
    pass, so it goes wherever the cache goes: beam reordering, cropping by assisted decoding, several caches at a time.

    Args:
        columns: the columns of the full sequence that are kept, [batch, width].
        end: how many columns the full sequence has so far; what follows is kept in full.

    Attributes:
        expected: set by the exit before each forward pass; without its masks the layer would be read wrongly.
    """

    def __init__(self, columns: Columns, end: int):
        super().__init__()
        self.columns, self.end, self.expected = columns, end, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.expected:
            raise ValueError(
                "this cache was filled under a visual exit and holds no visual tokens in some layers: continue it with "
                "the exit attached, or start a new cache"
            )
        self.expected = False
        return super().update(key_states, value_states, *args, **kwargs)

    @property
    def later(self) -> int:
        """How many of the places held follow the recorded columns."""
        return self.keys.shape[2] - self.columns.index.shape[1]

    def get_seq_length(self) -> int:
        """The length of the full sequence, as a sliding layer gives it: the model places new tokens and masks by it."""
        return self.end + self.later if self.is_initialized and self.keys.numel() > 0 else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Like its parent's; the columns removed must be held by every sample."""
        into = abs(tokens_to_remove) - self.later
        if into > 0:
            index = self.columns.index
            last = torch.arange(self.end - into, self.end, device=index.device)
            if into >= index.shape[1] or not bool((index[:, -into:] == last).all()):
                raise ValueError(
                    f"the cache cannot be cropped by {abs(tokens_to_remove)} tokens: visual tokens among them are gone "
                    "from some layers. Start a new cache instead"
                )
        super().crop(tokens_to_remove)
        if into > 0:
            kept, valid = self.columns.index[:, :-into], self.columns.valid[:, :-into]
            self.columns, self.end = Columns(kept, valid, self.columns.ragged), self.end - into

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self.columns = self.columns.reordered(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.columns = self.columns.rows(torch.arange(len(self.columns.index)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.columns = self.columns.rows(indices)

    def positions(self, new: int = 0) -> torch.Tensor:
        """The column of the full sequence of each place, those of ``new`` incoming tokens included: [batch, places]."""
        index = self.columns.index
        later = self.end + torch.arange(self.later + new, device=index.device)
        return torch.cat([index, later.expand(len(index), -1)], 1)

    def padding_mask(self, attention_mask: torch.Tensor | None, new: int) -> torch.Tensor | None:
        """Which places, those of ``new`` incoming tokens included, hold a token: bool [batch, places], None for all.

        Args:
            attention_mask: [batch, full length], as the model got it; None where nothing is padding.
        """
        if attention_mask is None and not self.columns.ragged:
            return None
        valid, later = self.columns.valid, self.later + new
        if attention_mask is None or attention_mask.shape[1] != self.end + later:
            return torch.cat([valid, valid.new_ones(len(valid), later)], 1)
        shown = attention_mask.to(valid.device, torch.bool)
        # A call may hide tokens that an earlier one showed.
        return torch.cat([valid & shown.gather(1, self.columns.index), shown[:, self.end :]], 1)

    def mask(
        self,
        config: PreTrainedConfig,
        hidden: torch.Tensor,
        attention_mask: torch.Tensor | None,
        window: int | None,
        own: Mask,
    ) -> Mask:
        """The attention mask of this layer for the incoming tokens ``hidden`` [batch, new, d].

        The window of a sliding layer counts positions of the full sequence, not places of the compact cache.

        Args:
            own: what the model made for this layer, as if its cache were not compact.
        """
        new, kind = hidden.shape[1], config._attn_implementation
        # A single token sees all that is held. The general way would ask the device whether anything is padding, once
        # for every set of columns, at every step; where the model made no mask, it has asked.
        if new == 1 and window is None and not self.columns.ragged and own is None and kind == "sdpa":
            return None
        padding = self.padding_mask(attention_mask, new)
        if new == 1 and window is None and self.columns.ragged and kind in ("sdpa", "eager"):
            allowed = padding[:, None, None, :].to(hidden.device)
            return allowed if kind == "sdpa" else _additive(allowed, hidden.dtype)
        in_window = None
        if window is not None:
            position = self.positions(new).to(hidden.device)

            def in_window(batch: Any, head: Any, query: Any, key: Any) -> Any:
                return position[batch, key] > position[batch, query] - window

        places = DynamicLayer()
        places.lazy_initialization(self.keys, self.values)
        places.keys, places.values = self.keys, self.values
        cache = Cache(layers=[places])
        return create_causal_mask(
            config, hidden, padding, past_key_values=cache, and_mask_function=in_window, layer_idx=0
        )


def held_columns(layer: CacheLayerMixin, valid: torch.Tensor) -> Columns:
    """Which columns of the sequence so far a filled cache layer holds.

    Args:
        valid: bool [batch, columns so far]; what is not padding.
    """
    if isinstance(layer, WithdrawnLayer):
        index, known = layer.positions().to(valid.device), layer.columns.valid.to(valid.device)
        held = valid.gather(1, index)
        held[:, : known.shape[1]] &= known
    else:
        past, kept = valid.shape[1], layer.keys.shape[2]
        index = torch.arange(past - kept, past, device=valid.device).expand(len(valid), -1)
        held = valid[:, past - kept :]
    return Columns(index, held, ragged=not bool(held.all()))


def continued_mask(
    mask: Mask, new: Columns, held: Columns, past: int, window: int | None, config: PreTrainedConfig
) -> Mask:
    """The mask of a layer for a later turn, whose cache holds some columns of the turns before.

    Among the new columns the model's own mask holds, so image blocks keep attending both ways.

    Args:
        mask: as the model made it for all new columns of the same samples; its key columns end with them.
        new: the columns of this turn that are kept, counted from its first one.
        held: the columns that the cache holds, counted from the beginning.
        past: how many columns there were before this turn.
        window: of the layer.
    """
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"a {type(mask).__name__} cannot be cut to fewer tokens in a later turn: load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    device = held.index.device if mask is None else mask.device
    index, valid = new.index.to(device), new.valid.to(device)
    before, known = held.index.to(device), held.valid.to(device)
    if "flash" in str(config._attn_implementation):
        return torch.cat([known, valid], 1)
    earlier = known[:, None, :].expand(-1, index.shape[1], -1)
    recent = index[:, None, :] <= index[:, :, None]
    if window is not None:
        earlier = earlier & (before[:, None, :] > past + index[:, :, None] - window)
        recent = recent & (index[:, None, :] > index[:, :, None] - window)
    if mask is not None:
        own = mask[:, 0, :, -mask.shape[2] :].expand(len(index), -1, -1)
        own = own.gather(1, index[:, :, None].expand(-1, -1, own.shape[2]))
        own = own.gather(2, index[:, None, :].expand(-1, index.shape[1], -1))
        recent = own if mask.dtype == torch.bool else own > torch.finfo(mask.dtype).min / 2
    allowed = torch.cat([earlier, recent & valid[:, None, :]], 2)[:, None]
    if mask is None or mask.dtype == torch.bool:
        return allowed
    return _additive(allowed, mask.dtype)


def _additive(allowed: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A bool mask as one that is added to attention scores."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)


def compact_mask(mask: Mask, columns: Columns, config: PreTrainedConfig, hidden: torch.Tensor) -> Mask:
    """The mask of a layer's prompt for compacted rows, from the one that the model made for all of them.

    Where the model gave a mask, its rows and columns are selected, so whatever structure it has is kept (windows,
    prefixes that attend both ways). Where it gave none, attention is causal, and only raggedness needs one.

    Args:
        mask: as handed to the layer for full rows, for the samples of ``columns`` only or for a batch of one.
        columns: what is kept.
        hidden: the compacted hidden states [n, width, d].
    """
    device = mask.device if isinstance(mask, torch.Tensor) else hidden.device
    index, valid = columns.index.to(device), columns.valid.to(device)
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


def layer_call(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """The hidden states a decoder layer is called with, and everything else by name."""
    if len(args) == 1:  # as transformers calls its own
        return args[0], kwargs
    parameters = inspect.signature(layer.forward).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(args) > len(names):
        raise ValueError(
            f"{type(layer).__name__} is called with {len(args)} arguments by place that its forward does not name: "
            "call decoder layers with all but the hidden states by name"
        )
    kwargs = dict(zip(names, args)) | kwargs
    first = "hidden_states" if "hidden_states" in kwargs else names[0]
    return kwargs[first], {name: value for name, value in kwargs.items() if name != first}


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
