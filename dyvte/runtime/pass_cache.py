"""The model's cache during one pass over a prompt, and the caches of the groups beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from dyvte.runtime.cache import KeptLayer, held_tokens, is_recurrent
from dyvte.runtime.cache_rows import merge_kept, merge_recurrent, put_layer, recurrent_rows
from dyvte.runtime.decoder import DecoderSpec
from dyvte.runtime.groups import Group
from dyvte.runtime.prompt import Prompt
from dyvte.runtime.tokens import KeptTokens


class PassCache:
    """Hands every group a cache layer of its own, and puts together what they wrote.

    Attributes:
        cache: the model's; None where it runs without one.
        length: columns of the turns before.
    """

    def __init__(self, spec: DecoderSpec, prompt: Prompt, cache: Cache | None, past: torch.Tensor):
        """
        Args:
            past: bool [batch, columns of the turns before], what is not padding there.
        """
        self.spec, self.prompt, self.cache, self.past = spec, prompt, cache, past
        self.batch, self.length = past.shape
        self._held: dict[tuple, KeptTokens] = {}

    def serves(self, index: int, group: Group) -> bool:
        """Whether a layer runs for a group as the model calls it: the whole batch, with all tokens there ever were."""
        source = self.spec.kinds[index].source
        return self._is_batch(group) and not isinstance(self._layer(index if source is None else source), KeptLayer)

    def _is_batch(self, group: Group) -> bool:
        return group.whole and group.cache is self.cache and len(group.samples) == self.batch

    def _layer(self, index: int) -> Any:
        layers = () if self.cache is None else self.cache.layers
        return layers[index] if index < len(layers) else None

    def held(self, index: int) -> KeptTokens | None:
        """What the model's cache holds of the turns before at a layer; None at a first turn."""
        layer = self._layer(index)
        if self.length == 0 or layer is None or is_recurrent(layer) or not self.spec.kinds[index].caches:
            return None
        key = (id(layer.tokens), layer.keys.shape[2]) if isinstance(layer, KeptLayer) else (layer.keys.shape[2],)
        if key not in self._held:
            self._held[key] = held_tokens(layer, self.past)
        return self._held[key]

    def prepare(self, index: int, group: Group, held: KeptTokens | None) -> Cache:
        """The cache of a group, with a layer that has what the model's cache holds of its samples from earlier turns.

        Raises:
            ValueError: the model's cache does not fit the layer.
        """
        before, kind = self._layer(index), self.spec.kinds[index]
        some = len(group.samples) != self.batch
        if not kind.caches:
            return group.cache
        if kind.attends:
            layer = self._kept_layer(group, before, held, some)
        elif is_recurrent(before):
            layer = recurrent_rows(before, group.samples if some else None)
        else:
            raise ValueError(
                f"decoder layer {index} keeps no keys, and {type(self.cache).__name__} holds no state for it: leave "
                "the cache to generate, or make a DynamicCache(config=model.config)"
            )
        put_layer(group.cache, index, layer)
        return group.cache

    def _kept_layer(self, group: Group, before: Any, held: KeptTokens | None, some: bool) -> KeptLayer:
        index, valid = group.tokens.index[:, :0], group.tokens.valid[:, :0]
        layer = KeptLayer(KeptTokens(index, valid, ragged=False), self.length)
        if held is not None:
            rows = group.samples_on(before.keys.device)
            layer.fill(*((before.keys[rows], before.values[rows]) if some else (before.keys, before.values)))
            layer.tokens = held.rows(group.samples_on(held.index.device)) if some else held
        everything = group.memo(lambda: self._with_new(group, held), "all tokens", held)
        layer.promise(everything, self.length + self.prompt.shape[1])
        return layer

    def _with_new(self, group: Group, held: KeptTokens | None) -> KeptTokens:
        """Everything that a group's cache holds after a layer, counted from the beginning of the conversation."""
        new = group.keys
        if held is None:
            return new
        rows = group.samples_on(held.index.device)
        index = torch.cat([held.index[rows], self.length + new.index], 1)
        return KeptTokens(index, torch.cat([held.valid[rows], new.valid], 1), held.ragged or new.ragged)

    def merge(self, index: int, groups: Sequence[Group]) -> None:
        """Writes what the groups cached into the model's cache.

        Raises:
            ValueError: a group's layer was not written, or not as promised.
        """
        if self.cache is None or not self.spec.kinds[index].caches:
            return
        own = [self._written(index, group) for group in groups]
        if all(group.cache is self.cache for group in groups):
            return
        parts = [(group.samples, layer) for group, layer in zip(groups, own)]
        if len(parts) == 1:
            merged = own[0]
        elif is_recurrent(own[0]):
            merged = merge_recurrent(parts, self.batch)
        else:
            tokens = [layer.tokens for layer in own]
            merged = merge_kept(
                parts, groups[0].memo(lambda: self._merged(groups, tokens), "merged", *tokens), self.batch
            )
        put_layer(self.cache, index, merged)
        for group in groups:
            put_layer(group.cache, index, DynamicLayer())

    def _written(self, index: int, group: Group) -> Any:
        layer = group.cache.layers[index] if index < len(group.cache.layers) else None
        if isinstance(layer, KeptLayer):
            layer.check_written(index)
        return layer

    def _merged(self, groups: Sequence[Group], tokens: Sequence[KeptTokens]) -> KeptTokens:
        """The tokens of all samples together, each row at the right end."""
        device = self.past.device
        width = max(part.width for part in tokens)
        places = torch.zeros(self.batch, width, dtype=torch.long, device=device)
        valid = torch.zeros_like(places, dtype=torch.bool)
        for group, part in zip(groups, tokens):
            rows, start = group.samples_on(device), width - part.width
            places[rows, start:], valid[rows, start:] = part.index.to(device), part.valid.to(device)
        return KeptTokens(places, valid, ragged=True)
