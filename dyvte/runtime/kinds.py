"""How decoder layers mix tokens, and from which of them tokens cannot be taken out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from dyvte.runtime.compat import TOKENWISE, PreTrainedConfig, layer_types

LINEAR = ("linear_attention", "conv", "mamba", "short_conv")
ATTENTION = ("full_attention", "sliding_attention", "chunked_attention")
_SEARCH = "searches the keys by their columns in its cache, and columns shift once tokens are gone"
REFUSED = {
    "dummy": "it has no keys and values of its own, and the config does not say whose it reads",
    "indexed_attention": f"an indexer {_SEARCH}",
    "minimax_m3_sparse": f"an indexer {_SEARCH}, in blocks of a fixed size",
    **dict.fromkeys(
        ("compressed_sparse_attention", "heavily_compressed_attention"),
        "its cache pools blocks of tokens, counted from the first column, into one",
    ),
    **dict.fromkeys(("hybrid", "hybrid_sliding"), "keys pass a convolution, whose state shares their cache layer"),
    "reference_sliding_attention": "its window leaves the whole prompt in sight, by its length in the cache",
}


@dataclass(frozen=True)
class LayerKind:
    """How a decoder layer mixes tokens.

    Attributes:
        name: "full_attention", "sliding_attention", "chunked_attention", "linear_attention" (any recurrent or
            convolutional layer), or "tokenwise" (none at all).
        span: tokens of the window or chunk.
        source: the layer whose keys and values it reads, as that one wrote them in the same pass; None: its own.
    """

    name: str
    span: int | None = None
    source: int | None = None

    @property
    def caches(self) -> bool:
        """Whether the layer writes to the cache."""
        return self.name != "tokenwise" and self.source is None

    @property
    def attends(self) -> bool:
        return self.name not in ("linear_attention", "tokenwise")

    def reaches(self, query: torch.Tensor, key: torch.Tensor, start: torch.Tensor | int) -> torch.Tensor | None:
        """Which keys lie in the span of a query, by their columns in the full sequence; None: all before it.

        Args:
            query: long, columns of the queries.
            key: long, columns of the keys; broadcasts with ``query``.
            start: the first column that is not padding, from which chunks are counted.
        """
        if self.name == "sliding_attention" and self.span is not None:
            return key > query - self.span
        if self.name == "chunked_attention":
            return (key - start) // self.span == (query - start) // self.span
        return None


def layer_kinds(config: PreTrainedConfig, num_layers: int) -> tuple[LayerKind, ...]:
    """How every decoder layer mixes tokens.

    Raises:
        ValueError: a layer is of a kind from which tokens cannot be withdrawn.
    """
    kinds: list[LayerKind] = []
    types, sources = layer_types(config), key_sources(config)
    for index in range(num_layers):
        name, span = types[index] if index < len(types) else ("full_attention", None)
        if index in sources:
            kinds.append(replace(kinds[sources[index]], source=sources[index]))
        elif name in LINEAR:
            kinds.append(LayerKind("linear_attention"))
        elif name in TOKENWISE:
            kinds.append(LayerKind("tokenwise"))
        elif name in ATTENTION:
            kinds.append(LayerKind(name, span))
        else:
            raise ValueError(
                f"decoder layer {index} is of type {name!r}, and visual tokens cannot be withdrawn from it: "
                f"{REFUSED.get(name, 'it is not known how it mixes tokens')}. Use a model whose decoder layers are "
                "full, sliding, chunked or linear attention"
            )
    return tuple(kinds)


def key_sources(config: PreTrainedConfig) -> dict[int, int]:
    """The layers that read the keys and values of an earlier one, and of which: the last of their type with its own."""
    modes, types = getattr(config, "kv_sharing_modes", None), getattr(config, "layer_types", None) or ()
    if modes is None:
        shared = getattr(config, "num_kv_shared_layers", None) or 0
        modes = ["store"] * (len(types) - shared) + ["reuse"] * shared
    sources, stored = {}, {}
    for index, (mode, name) in enumerate(zip(modes, types)):
        if mode == "reuse" and name in stored:
            sources[index] = stored[name]
        elif mode == "store":
            stored[name] = index
    return sources
