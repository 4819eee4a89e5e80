"""Cache layers for some rows of a batch, and one for the whole batch from those of its groups."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from dyvte.runtime.cache import KeptLayer
from dyvte.runtime.tokens import KeptTokens


def put_layer(cache: Cache, index: int, layer: Any) -> None:
    """Makes ``layer`` the cache of decoder layer ``index``."""
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    cache.layers[index] = layer


def recurrent_rows(layer: Any, rows: torch.Tensor | None) -> Any:
    """A copy of a recurrent layer for some rows of the batch, all if None; one that is not filled yet stays empty."""

    def select(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: select(part) for key, part in value.items()}
        if isinstance(value, torch.Tensor) and value.ndim > 1:
            return value.clone() if rows is None else value[rows.to(value.device)]
        return value

    chosen = copy.copy(layer)
    for name, value in vars(layer).items():
        setattr(chosen, name, select(value))
    return chosen


def merge_recurrent(parts: Sequence[tuple[torch.Tensor, Any]], batch: int) -> Any:
    """One recurrent layer from those of groups of samples: (rows of the batch, layer) each."""

    def merge(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {key: merge([value[key] for value in values]) for key in first}
        if isinstance(first, torch.Tensor) and first.ndim > 1:
            together = first.new_zeros(batch, *first.shape[1:])
            for (rows, _), value in zip(parts, values):
                together[rows.to(together.device)] = value.to(together.device)
            return together
        return first

    merged = copy.copy(parts[0][1])
    for name in vars(merged):
        setattr(merged, name, merge([getattr(layer, name) for _, layer in parts]))
    return merged


def merge_kept(parts: Sequence[tuple[torch.Tensor, KeptLayer]], tokens: KeptTokens, batch: int) -> KeptLayer:
    """One layer from those of groups of samples, each row at the right end: (rows of the batch, layer) each."""
    like, width = parts[0][1], tokens.width
    merged = KeptLayer(tokens, like.end)
    states = []
    for name in ("keys", "values"):
        first = getattr(like, name)
        together = first.new_zeros(batch, first.shape[1], width, first.shape[3])
        for rows, layer in parts:
            part = getattr(layer, name)
            together[rows.to(together.device), :, width - part.shape[2] :] = part.to(together.device)
        states.append(together)
    merged.fill(*states)
    return merged


def group_cache() -> DynamicCache:
    """An empty cache for a group of samples."""
    return DynamicCache()
